"""The parts of CompressAI that networks here are made of, imported without what its package brings along."""

from oscar.utils.lean_imports import without_init

with without_init("compressai", "scipy.stats"):  # of which only CompressAI's own tables make use
    from compressai.entropy_models import EntropyBottleneck, GaussianConditional
    from compressai.layers import AttentionBlock

__all__ = ["AttentionBlock", "EntropyBottleneck", "GaussianConditional"]
