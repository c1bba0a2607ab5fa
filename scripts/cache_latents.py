"""Cache the latents of training crops: `python scripts/cache_latents.py data.train=[photos] output=latents`.

Every field of the configuration can be overridden on the command line; the same command run again resumes. Several
processes share the work: `torchrun --nproc-per-node 4`. Train on them with `stage=bottleneck data.latents=latents`.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from oscar.config import CacheLatentsConfig, parse_job, register
from oscar.utils.errors import one_line, run_script

register()


@hydra.main(config_path="../configs", config_name="cache_latents", version_base="1.3")
@one_line("cache_latents")
def main(config: DictConfig) -> None:
    typed, _ = parse_job(config, CacheLatentsConfig)
    from oscar.training.latent_cache import cache_latents

    index = cache_latents(typed)
    print(f"{index.count} latents of {index.images} images, {index.crops} crops each, in {typed.output}")


def run() -> None:
    run_script(main, "cache_latents")


if __name__ == "__main__":
    run()
