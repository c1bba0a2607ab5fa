"""Compare timestep mappings, and a sweep, over one checkpoint: `python scripts/ablate_timesteps.py data.images=photos`.

Writes a table with the measured mappings, the paper's and the best timestep side by side, and plots of quality against
timestep. Every field of the configuration can be overridden on the command line; the same command run again resumes,
and adds what mappings and timesteps are new.
"""

from __future__ import annotations

from oscar.cli.scripts import SCRIPTS

run = SCRIPTS["ablate_timesteps"].run

if __name__ == "__main__":
    run()
