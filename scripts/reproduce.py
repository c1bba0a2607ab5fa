"""Tables and figures of the paper, and ablations: `python scripts/reproduce.py study=rd model=nano data.root=data`.

Studies: rd, unseen_rates, timesteps, losses, lora_rank, stages, design, entropy, complexity. The same command again
goes on where it stopped. Started several times, or by `torchrun --nproc-per-node 8`, its processes share the jobs, a
GPU each. `dry_run=true` prints the jobs, their number and estimated hours.
"""

from __future__ import annotations

from oscar.cli.scripts import SCRIPTS

run = SCRIPTS["reproduce"].run

if __name__ == "__main__":
    run()
