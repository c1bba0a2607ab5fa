"""Cache the latents of training crops: `python scripts/cache_latents.py data.train=[photos] output=latents`.

Every field of the configuration can be overridden on the command line; the same command run again resumes. Several
processes share the work: `torchrun --nproc-per-node 4`. Train on them with `stage=bottleneck data.latents=latents`.
"""

from __future__ import annotations

from oscar.cli.scripts import SCRIPTS

run = SCRIPTS["cache_latents"].run

if __name__ == "__main__":
    run()
