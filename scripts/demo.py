"""The codec on real photographs: every rate, real files on disk, a table, a page and a contact sheet.

python scripts/demo.py                      scikit-image's packaged photographs, output in demo/
python scripts/demo.py --images ~/photos    your own, found recursively
"""

from __future__ import annotations

from oscar.cli.scripts import SCRIPTS

run = SCRIPTS["demo"].run

if __name__ == "__main__":
    run()
