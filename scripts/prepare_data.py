"""Lay out a data set of the paper for training or evaluation, and check it.

    python scripts/prepare_data.py kodak data --download
    python scripts/prepare_data.py lsdir data --source ~/LSDIR --shards 1000
    python scripts/prepare_data.py div2k data                    # says where it comes from; checks what is there

Images come to ROOT/DATASET. Folders and archives (zip, tar) that you have are given by --source; --download fetches
what can be fetched without a form.
"""

from __future__ import annotations

from oscar.cli.scripts import SCRIPTS

run, main = SCRIPTS["prepare_data"].run, SCRIPTS["prepare_data"].main

if __name__ == "__main__":
    run()
