"""The stages of training, by name; each registers itself."""

from oscar.training.stages import vae, diffusion_pretrain, bottleneck, joint, context  # noqa: F401, I001 (their order)
