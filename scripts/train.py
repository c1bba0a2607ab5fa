"""Train one stage: `python scripts/train.py experiment=nano/vae`, or several processes with `torchrun`.

Every field of the configuration can be overridden on the command line; the same command run again resumes. With
`preflight=true` it trains nothing, and says what would stop the run or slow it down.
"""

from __future__ import annotations

from oscar.cli.scripts import SCRIPTS

run = SCRIPTS["train"].run

if __name__ == "__main__":
    run()
