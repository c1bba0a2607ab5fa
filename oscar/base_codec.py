"""What a codec consists of, and who it is: parts, operating points, checkpoint, fingerprint; not what it does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from oscar import checkpoint
from oscar.bottlenecks import Bottleneck, Components, Point
from oscar.file_identity import FileIdentity
from oscar.models.backbone import Backbone
from oscar.models.denoiser import Denoiser
from oscar.timesteps import TimestepMapping

if TYPE_CHECKING:
    from typing_extensions import Self


class BaseCodec(FileIdentity, nn.Module):
    """The parts of a codec.

    Args:
        backbone: VAE, UNet and noise schedule.
        bottleneck: latents to bytes and back.
        denoiser: the backbone's UNet, adapted; None among the encoder's components.
        mapping: pseudo-timestep of each operating point, or of each image.
        fingerprint: if it is known.
        provenance: how it was trained, in JSON-able form (`oscar.utils.provenance`).

    Attributes:
        components: what was loaded: "both", or what the "encoder" or the "decoder" needs.

    Raises:
        ValueError: if these do not go together.
    """

    bottleneck: Bottleneck

    def __init__(
        self,
        backbone: Backbone,
        bottleneck: Bottleneck,
        denoiser: Denoiser | None,
        mapping: TimestepMapping,
        fingerprint: str | None = None,
        provenance: dict | None = None,
    ):
        super().__init__()
        if bottleneck.factor not in (None, backbone.factor):
            raise ValueError(
                f"the backbone reduces each side by {backbone.factor}; "
                f"allowed with {bottleneck.point_name}s: {bottleneck.factor}"
            )
        self.backbone, self.bottleneck, self.denoiser = backbone, bottleneck, denoiser
        self.components: Components = "both" if denoiser is not None else "encoder"
        self.provenance = provenance
        self.set_mapping(mapping)
        self._fingerprint = fingerprint

    @classmethod
    def from_pretrained(cls, source: str | Path, backbone: str | Path | None = None, unet: bool = True) -> Self:
        """Read a checkpoint as it is trained: plain modules, float32, on the CPU. `oscar.load` is for everyday use.

        Args:
            source: "nano" (in the package), a checkpoint folder or a hub id.
            backbone: where the backbone is now that the checkpoint names, if it has moved.
            unet: whether to read UNet and denoiser too; without them it trains the bottleneck, and decodes nothing.

        Raises:
            CheckpointError: if it cannot be found or read.
        """
        loaded = checkpoint.load(source, backbone, unet)
        return cls(*loaded.parts, loaded.fingerprint, loaded.provenance)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder (see `oscar.checkpoint`), completely or not at all.

        Raises:
            CheckpointError: if the folder exists and is no checkpoint, or half of the codec is not there.
        """
        if self.components != "both":
            raise checkpoint.CheckpointError(
                f"components is {self.components!r}, so the other one is not there to be saved; allowed: both"
            )
        checkpoint.save(self.parts, folder, dtype, self.provenance)

    @property
    def parts(self) -> checkpoint.Parts:
        """What the codec consists of, as checkpoints are written from it."""
        return checkpoint.Parts(self.backbone, self.bottleneck, self.denoiser, self.mapping)

    # Operating points and identity.

    def find_point(self, point: float | Point | None = None, **named: float | None) -> Point:
        """The operating point that is meant (ValueError if this model has none such)."""
        return self.bottleneck.find(point, **named)

    def set_mapping(self, mapping: TimestepMapping) -> None:
        """Decode at other timesteps from now on; files written before are another model's then.

        Raises:
            ValueError: if it lacks an operating point, or points outside the schedule.
        """
        mapping.check(self.bottleneck.points, len(self.backbone.schedule))
        if mapping.per_image and not self.bottleneck.per_image_timesteps:
            raise ValueError(
                f"timesteps.kind is {mapping.kind!r}, but this model has {self.bottleneck.point_words}; "
                "allowed: a mapping of operating points"
            )
        self.mapping = mapping
        self.forget_fingerprint()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decoding depends on, in hexadecimal; see `checkpoint.fingerprint`."""
        if self._fingerprint is None:
            self._fingerprint = checkpoint.fingerprint(self.parts)
        return self._fingerprint

    def forget_fingerprint(self) -> None:
        """Have the fingerprint computed anew, after weights or tables were changed."""
        self._fingerprint = None

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.forget_fingerprint()  # the weights are about to change
        return super().train(mode)

    def need(self, components: Components) -> None:
        """Refuse (ValueError) what these components are needed for, where they were not loaded."""
        if self.components not in ("both", components):
            what = {"encoder": "compress", "decoder": "decompress"}[components]
            raise ValueError(f"components is {self.components!r}, which cannot {what}; allowed: both, {components}")

    @property
    def factor(self) -> int:
        """Pixels per latent position along each side."""
        return self.backbone.factor

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameter.dtype

    @property
    def _parameter(self) -> nn.Parameter:
        return next(itertools.chain(self.bottleneck.parameters(), self.backbone.parameters()))
