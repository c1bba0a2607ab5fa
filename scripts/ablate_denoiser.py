"""What the denoising step does, over one checkpoint: `python scripts/ablate_denoiser.py data.images=photos`.

Decodes the same files with the UNet, at one timestep for all operating points, and without it, and writes tables of
these beside the autoencoder without quantisation. Every field of the configuration can be overridden on the command
line; the same command run again resumes.
"""

from __future__ import annotations

from oscar.cli.scripts import SCRIPTS

run = SCRIPTS["ablate_denoiser"].run

if __name__ == "__main__":
    run()
