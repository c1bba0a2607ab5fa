"""Evaluate a codec on a folder of images: `python scripts/evaluate.py data.images=photos codec=jpeg`.

Every field of the configuration can be overridden on the command line; the same command run again resumes. Several
processes share the images: `accelerate launch --num_processes 4` with GPUs, `torchrun --nproc-per-node 2` without.
"""

from __future__ import annotations

from oscar.cli.scripts import SCRIPTS

run = SCRIPTS["evaluate"].run

if __name__ == "__main__":
    run()
