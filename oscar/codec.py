"""The codec: image <-> bytes. The whole flow of the method can be read on this page.

compress    image - VAE encoder - latent z0 - bottleneck(rate) - indices - entropy coder - bytes
decompress  bytes - entropy coder - indices - bottleneck(rate) - z_hat - rescale - UNet at t(rate), one step - x0
            - VAE decoder - image

Only under mapping `per_image` is t the picture's own: `compress` measures it, and the file carries it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from oscar import checkpoint, images
from oscar.bitstream import (
    MAX_SIDE,
    Coding,
    Container,
    HeaderError,
    PayloadError,
    UnknownRateError,
    WrongModelError,
    context,
    entropy,
)
from oscar.bitstream.context import ContextModel, decode_grid, decode_prefix, encode_grid
from oscar.bitstream.entropy import uniform_frequencies
from oscar.bitstream.norms import dequantise_rms, quantise_rms
from oscar.effort import cheaper_indices, check_effort
from oscar.models.backbone import VAE_DECODER, Backbone, Half, decode, encode
from oscar.models.denoiser import Denoiser
from oscar.models.hyper_encoder import VQBottleneck
from oscar.models.inference import (
    auto_dtype,
    cache_prompt,
    compile_networks,
    compute_wide,
    imitates,
    load_tiny_vae,
    make_lean,
    use_fewer_multiplications,
)
from oscar.models.loading import drop
from oscar.models.padding import pad_to_multiple
from oscar.models.precision import compute_finite, widen, without_tf32
from oscar.models.reuse import give_back_memory
from oscar.models.tiling import MemoryBudget
from oscar.protocol import PAPER_MULTIPLE, Protocol, check_protocol, image_noise
from oscar.rates import PIXELS_PER_LATENT, RatePoint, find_rate
from oscar.targets import compress_within
from oscar.timesteps import TimestepMapping, timestep_code, timestep_of_code

DEFAULT_RATE = 0.0625


class Analysis(NamedTuple):
    """What the encoder finds in a batch of images.

    Attributes:
        latent: z0, scaled posterior mode of the padded images (B, 4, h, w).
        indices: code indices, int64 (B, rows, columns).
        rms: root mean square of each latent channel (B, 4), which is the norm over the square root of h * w.
        timesteps: the pictures' own, int64 (B,), as a file can say them; None where the rate determines them.
    """

    latent: Tensor
    indices: Tensor
    rms: Tensor
    timesteps: Tensor | None


class Reconstruction(NamedTuple):
    """What the decoder gets and makes.

    Attributes:
        indices: code indices, int64 (B, rows, columns).
        z_hat: quantised latent before rescaling (B, 4, h, w).
        x0: denoised latent (B, 4, h, w).
        image: images (B, 3, H, W), clamped to [-1, 1].
    """

    indices: Tensor
    z_hat: Tensor
    x0: Tensor
    image: Tensor


class Preview(NamedTuple):
    """What a part of a file shows.

    Attributes:
        image: the picture.
        share: of its symbols that were read, 0 to 1.
    """

    image: Image.Image
    share: float


class OscarCodec(nn.Module):
    """One model for all of its rates.

    Args:
        backbone: VAE, UNet and noise schedule.
        bottleneck: symbols of a latent and back, at each of its rates.
        denoiser: the backbone's UNet, adapted; None in the encoder half.
        mapping: pseudo-timestep of each rate, or of each picture.
        frequencies: integer frequency table by rate id, int32 (K,); a rate without one is coded uniformly.
        contexts: context model by rate id, for rates whose indices it predicts.

    Attributes:
        provenance: how it was trained (`oscar.provenance`), as its checkpoint says; None if it does not.
        point_name: what `points` are, "rate" or "quality".
    """

    point_name = "rate"

    def __init__(
        self,
        backbone: Backbone,
        bottleneck: VQBottleneck,
        denoiser: Denoiser | None,
        mapping: TimestepMapping,
        frequencies: dict[int, np.ndarray] | None = None,
        contexts: dict[int, ContextModel] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.bottleneck = bottleneck
        self.denoiser = denoiser
        self.half: Half = "both"
        self.preview: nn.Module | None = None
        self.provenance: dict | None = None
        self.set_mapping(mapping)
        if self.rates and backbone.factor != PIXELS_PER_LATENT:
            raise ValueError(f"the backbone reduces each side by {backbone.factor}; "
                             f"allowed with rates: {PIXELS_PER_LATENT}")  # fmt: skip
        self.frequencies = {rate.id: uniform_frequencies(bottleneck.at(rate).codebook_size) for rate in self.rates}
        self.frequencies.update(frequencies or {})
        self.contexts = dict(contexts or {})

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | Literal["auto"] = "auto",
        half: Half = "both",
        compile: bool | Literal["graphs"] = False,
        tiny_vae: str | Path | None = None,
        memory: int | str | MemoryBudget | None = "auto",
        backbone: str | Path | None = None,
    ) -> OscarCodec:
        """Load a checkpoint for inference: in evaluation mode, adapters merged, networks made fast.

        Args:
            source: "nano" (in the package), a checkpoint folder or a hub id.
            device: where the networks run.
            dtype: their precision; "auto" takes float32 for models of fewer than 100 million parameters, so that their
                files are the same on every device; for larger ones bfloat16 or float16 where the device computes in it,
                else float32.
            half: "encoder" or "decoder" reads only what compressing or decompressing needs.
            compile: whether to have torch.compile compile the networks on their first call for each size of picture;
                "graphs" replays them as CUDA graphs too.
            tiny_vae: folder or hub id of a diffusers AutoencoderTiny that decodes in place of the VAE, for previews.
            memory: what large pictures may take beyond the weights, as `set_memory` has it.
            backbone: folder or hub id of the backbone that the checkpoint names, if it has moved; must be the same one.

        Raises:
            CheckpointError: if it cannot be found or read.
            ValueError: for an option that is not allowed or cannot be had here.
        """
        for name, value, allowed in (("half", half, ("both", "encoder", "decoder")),
                                     ("compile", compile, (False, True, "graphs"))):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")
        device = torch.device(device)
        small, large = (torch.float32, auto_dtype(device)) if dtype == "auto" else (dtype, dtype)
        budget = MemoryBudget.parse(memory)
        codec = checkpoint.load_merged(source, half, small, backbone, large)
        if tiny_vae is not None and half != "encoder":
            codec.preview = load_tiny_vae(tiny_vae, codec.backbone.latent_channels, codec.dtype)
            drop(codec.backbone.vae, VAE_DECODER)
        codec.eval().requires_grad_(False).to(device)
        codec.prepare(compile)
        codec.set_memory(budget)
        give_back_memory()
        return codec

    @torch.no_grad()
    def prepare(self, compile: bool | Literal["graphs"] = False) -> None:
        """Make the networks fast for inference; see `oscar.models.inference`."""
        make_lean(self)
        if self.denoiser is not None and self.denoiser.prompt is not None:
            cache_prompt(self.denoiser.unet, self.denoiser.prompt)
        if compile:
            vae = self.backbone.vae
            networks = (getattr(vae, "encoder", None), getattr(vae, "decoder", None), self.backbone.unet, self.preview)
            compile_networks([network for network in networks if network is not None], self.device, compile == "graphs")
        elif self.device.type == "cpu" and self.dtype == torch.float32:
            use_fewer_multiplications(self)
        elif imitates(self.device, self.dtype):
            compute_wide(self)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder (see `oscar.checkpoint`), completely or not at all."""
        checkpoint.save(self, folder, dtype)

    @property
    def rates(self) -> tuple[RatePoint, ...]:
        """The rate points that this model has, by id."""
        return self.bottleneck.rates

    def keep_rates(self, rates: Sequence[RatePoint]) -> None:
        """Drop all other rates, with their tables and context models."""
        self.bottleneck.keep(rates)
        ids = {rate.id for rate in rates}
        self.frequencies = {rate_id: table for rate_id, table in self.frequencies.items() if rate_id in ids}
        self.contexts = {rate_id: model for rate_id, model in self.contexts.items() if rate_id in ids}
        self.forget_fingerprint()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decoding depends on but for context models, in hexadecimal; see `checkpoint.fingerprint`."""
        if self._fingerprint is None:
            self._fingerprint = checkpoint.fingerprint(self)
        return self._fingerprint

    @property
    def model_tag(self) -> int:
        """The first 16 bits of the fingerprint, which every file carries that is not coded by context."""
        return int(self.fingerprint[:4], 16)

    def file_tag(self, coding: Coding, rate: RatePoint) -> int:
        """The tag that a file carries: `model_tag`, or 16 bits that depend on the rate's context model too.

        So a context model leaves files alone that do without it.

        Raises:
            WrongModelError: for coding by context at a rate that has no context model.
        """
        if coding != Coding.CONTEXT:
            return self.model_tag
        if rate.id not in self.contexts:
            raise WrongModelError(f"the file is coded by context; this model has none for rate {rate.bpp:.4f}")
        digest = hashlib.sha256(bytes.fromhex(self.fingerprint) + self.contexts[rate.id].digest)
        return int.from_bytes(digest.digest()[:2], "big")

    def train(self, mode: bool = True) -> OscarCodec:
        if mode:
            self.forget_fingerprint()  # the weights are about to change
        return super().train(mode)

    def forget_fingerprint(self) -> None:
        """Have the fingerprint computed anew, after weights or tables were changed."""
        self._fingerprint: str | None = None

    def set_mapping(self, mapping: TimestepMapping) -> None:
        """Decode at other timesteps from now on; files written before are another model's then.

        Raises:
            ValueError: if it lacks one of this model's rates, or points outside its schedule.
        """
        mapping.check(self.rates, len(self.backbone.schedule))
        self.mapping = mapping
        self.forget_fingerprint()

    def set_memory(self, memory: int | str | MemoryBudget | None) -> None:
        """Bound the memory of large pictures (see `oscar.models.tiling`): files and pictures do not depend on it.

        Args:
            memory: bytes beyond the weights, a size such as "4GB", "auto" (by what is free), or None, no bound.

        Raises:
            ValueError: for anything else.
        """
        self.backbone.memory = MemoryBudget.parse(memory)

    # Pictures and bytes.

    def compress(
        self,
        image: Image.Image | np.ndarray | Tensor,
        rate: float | RatePoint | None = None,
        effort: int = 0,
        max_bytes: int | None = None,
        quality: float | None = None,
    ) -> bytes:
        """Compress one picture into the bytes of an `.oscar` file.

        Args:
            image: PIL image, uint8 array (H, W), (H, W, 3) or (H, W, 4), or tensor (3, H, W), uint8 or in [-1, 1].
            rate: nominal bits per pixel of one of `rates`, or a rate point; 0.0625 unless it or `max_bytes` is set.
            effort: 0 (the nearest codes) to 9: the higher, the more of them give way to others that cost fewer bits
                (see `oscar.effort`).
            max_bytes: length of the file at most, in place of rate and effort: the highest rate that fits is taken, and
                the lowest effort.
            quality: in place of a rate, 0 to 1, for models with a hyperprior (`oscar.continuous`).

        Raises:
            ImageError: for a picture that cannot be represented (transparency, more than 65536 pixels a side).
            ValueError: for a rate that this model does not have, an effort that does not exist, or a length that no
                rate meets.
        """
        if quality is not None:
            raise ValueError(f"quality is {quality}, but this model has rates; allowed: rate or max_bytes")
        if max_bytes is None:
            return self.compress_batch([image], DEFAULT_RATE if rate is None else rate, effort)[0]
        if rate is not None or effort:
            raise ValueError("max_bytes is set, which chooses rate and effort itself; allowed: it alone")
        return compress_within(self, as_batch(image), max_bytes)

    def compress_batch(
        self,
        pictures: Sequence[Image.Image | np.ndarray | Tensor],
        rate: float | RatePoint = DEFAULT_RATE,
        effort: int = 0,
    ) -> list[bytes]:
        """Compress several pictures; those of one size go through the networks together. See `compress`."""
        point = self.find_point(rate)
        batches = [as_batch(picture) for picture in pictures]
        groups: dict[tuple[int, int], list[int]] = {}
        for position, batch in enumerate(batches):
            groups.setdefault(tuple(batch.shape[-2:]), []).append(position)
        result = [b""] * len(batches)
        for positions in groups.values():
            files = self.compress_tensor(torch.cat([batches[position] for position in positions]), point, effort)
            for position, data in zip(positions, files, strict=True):
                result[position] = data
        return result

    def decompress(self, data: bytes) -> Image.Image:
        """Restore the picture of an `.oscar` file.

        Raises:
            BitstreamError: if the data is damaged, foreign, or was written with another model.
        """
        return self.decompress_batch([data])[0]

    def decompress_batch(self, files: Sequence[bytes]) -> list[Image.Image]:
        """Restore the pictures of several files; those of one size and rate go through the networks together.

        Raises:
            BitstreamError: if one of them cannot be decoded; nothing is decoded then.
        """
        return [images.to_pil(image) for image in self.decompress_tensor(files)]

    # Batches of tensors beneath them.

    @torch.inference_mode()
    def compress_tensor(self, batch: Tensor, rate: float | RatePoint, effort: int = 0) -> list[bytes]:
        """Images (B, 3, H, W) in [-1, 1] -> the bytes of one file each."""
        rate = self.find_rate(rate)
        analysis = self.economise(self.analyse(batch, rate), rate, check_effort(effort))
        return self.write(analysis, rate, height=batch.shape[-2], width=batch.shape[-1])

    def write(
        self, analysis: Analysis, rate: RatePoint, height: int, width: int, newest: Coding = Coding.CONTEXT
    ) -> list[bytes]:
        """What was found in images of `height` x `width` -> files, in the shortest coding up to the newest allowed."""
        grids, norms = analysis.indices.cpu().numpy(), quantise_rms(analysis.rms.float().cpu().numpy())
        codes = [None] * len(grids)
        if analysis.timesteps is not None:
            codes = timestep_code(analysis.timesteps, len(self.backbone.schedule)).tolist()
        files = []
        for grid, norm, code in zip(grids, norms, codes, strict=True):
            coding, payload = encode_grid(grid, self.frequencies[rate.id], self.contexts.get(rate.id), newest)
            tag = self.file_tag(coding, rate)
            container = Container(coding, rate.id, tag, width, height, norm.tobytes(), payload, code)
            files.append(container.pack())
        return files

    @torch.inference_mode()
    def decompress_tensor(self, files: Sequence[bytes]) -> list[Tensor]:
        """Files -> images (3, H, W) in [-1, 1]; files of equal size and rate are decoded as one batch.

        Raises:
            BitstreamError: if one of them cannot be decoded; nothing is decoded then.
        """
        parsed = [self.read(data) for data in files]
        groups: dict[tuple, list[int]] = {}
        for position, (container, _) in enumerate(parsed):
            point = container.rate_id if container.quality is None else container.quality
            groups.setdefault((point, container.height, container.width), []).append(position)
        result: list[Tensor] = [torch.empty(0)] * len(files)
        for (_, height, width), positions in groups.items():
            containers, symbols = zip(*(parsed[position] for position in positions), strict=True)
            decoded = self.restore(containers, torch.from_numpy(np.stack(symbols)).to(self.device))
            for position, image in zip(positions, decoded[..., :height, :width], strict=True):
                result[position] = image
        return result

    @torch.inference_mode()
    def restore(self, containers: Sequence[Container], indices: Tensor) -> Tensor:
        """Decoder half: containers of one rate and size, and their indices (B, rows, columns) -> padded images."""
        rms = self.stored_rms(torch.tensor([list(container.norms) for container in containers]))
        return self.synthesise(indices, rms, containers[0].rate, self.stored_timesteps(containers)).image

    def read(self, data: bytes) -> tuple[Container, np.ndarray]:
        """Bytes of a file -> its container and the indices, int64 (rows, columns).

        Raises:
            BitstreamError: if it is damaged, foreign, or was written with another model.
        """
        container = self.open(data)
        shape = container.rate.grid_shape(container.height, container.width)
        table, model = self.frequencies[container.rate_id], self.contexts.get(container.rate_id)
        return container, decode_grid(container.payload, container.coding, shape, table, model).astype(np.int64)

    def open(self, data: bytes, whole: bool = True) -> Container:
        """Bytes of a file -> its container, if this model wrote it; without `whole` its end may be missing.

        Raises:
            BitstreamError: if it is damaged, foreign, or was written with another model.
        """
        container = Container.unpack(data, whole)
        if container.quality is not None:
            raise WrongModelError("the file was written by a model with a hyperprior; this one has a vector quantiser")
        rate = container.rate
        tag = self.file_tag(container.coding, rate)
        if container.model_tag != tag:
            raise WrongModelError(f"the file was written with model {container.model_tag:04x}; this model is {tag:04x}")
        if rate not in self.rates:
            raise UnknownRateError(f"the file has rate {rate.bpp:.4f}, which this model does not have")
        if (container.timestep is not None) != self.mapping.per_picture:
            has, wants = ("no", "one") if self.mapping.per_picture else ("a", "none")
            raise HeaderError(f"the file has {has} timestep of its own; allowed for this model: {wants}")
        return container

    def decompress_prefix(self, data: bytes) -> Preview:
        """What the first bytes of a file show: symbols are coded from coarse to fine, and those that are not there yet
        are taken to be the likeliest.

        Args:
            data: the header and as much of the rest as there is. Damage is not noticed.

        Raises:
            BitstreamError: if the header is not there, is foreign or another model's, or the coding has no preview.
        """
        container = self.open(data, whole=False)
        symbols, share = self.read_prefix(container)
        image = self.restore([container], torch.from_numpy(symbols[None]).to(self.device))[0]
        return Preview(images.to_pil(image[:, : container.height, : container.width]), share)

    def read_prefix(self, container: Container) -> tuple[np.ndarray, float]:
        """The symbols of a file whose end may be missing, and the share of them that was read."""
        if container.coding != Coding.CONTEXT:
            raise PayloadError(f"coding {container.coding.name.lower()} has no preview; allowed: context, hyperprior")
        shape = container.rate.grid_shape(container.height, container.width)
        grid, share = decode_prefix(container.payload, shape, self.contexts[container.rate_id])
        return grid.astype(np.int64), share

    @torch.inference_mode()
    def reconstruct(
        self, batch: Tensor, rate: float | RatePoint, protocol: Protocol = "bitstream"
    ) -> Reconstruction:
        """Both directions in one call.

        Args:
            batch: images (B, 3, H, W) in [-1, 1], of any size.
            rate: nominal bits per pixel, or a rate point.
            protocol: "bitstream" gives the decoder what a file holds; "paper" does what the published implementation
                does, without any file: the latent is a sample (`oscar.protocol.image_noise`), the decoder gets the
                original latent's norms, unquantised, and nothing is padded.

        Raises:
            ValueError: for a rate or protocol that does not exist, or images that protocol paper would have to pad.
        """
        check_protocol(protocol)
        rate = self.find_rate(rate)
        if protocol == "paper" and any(side % rate.pixels_per_index for side in batch.shape[-2:]):
            raise ValueError(f"images of {batch.shape[-1]}x{batch.shape[-2]} pixels are not allowed in protocol paper, "
                             f"which does not pad; allowed: sides that are multiples of {PAPER_MULTIPLE}")  # fmt: skip
        analysis = self.analyse(batch, rate, is_sampled=protocol == "paper")
        rms = analysis.rms
        if protocol == "bitstream":
            rms = self.stored_rms(torch.from_numpy(quantise_rms(rms.float().cpu().numpy())))
        height, width = batch.shape[-2:]
        result = self.synthesise(analysis.indices, rms, rate, analysis.timesteps)
        return result._replace(image=result.image[..., :height, :width])

    # The two halves.

    def analyse(self, batch: Tensor, rate: RatePoint, is_sampled: bool = False) -> Analysis:
        """Encoder half: images (B, 3, H, W), padded here to whole indices by replicating the edge.

        The latent is the posterior's mode, or as protocol `paper` has it a sample (`oscar.protocol.image_noise`).
        """
        latent = self.encode_latent(batch, rate.pixels_per_index, is_sampled)
        with without_tf32():
            indices = self.bottleneck.encode(latent, rate)
        timesteps = None
        if self.mapping.per_picture:
            timesteps = self.measure_timesteps(self.bottleneck.decode(indices, rate), latent)
        return Analysis(latent, indices, channel_rms(latent), timesteps)

    def encode_latent(self, batch: Tensor, multiple: int | None = None, is_sampled: bool = False) -> Tensor:
        """Encoder half: images (B, 3, H, W), padded here by replicating the edge -> latent (B, C, h, w), float32.

        Args:
            batch: images in [-1, 1].
            multiple: that the padded sides are of; by default the pixels per latent position.
            is_sampled: see `analyse`.

        Raises:
            ImageError: for images whose values are not finite.
            NotFiniteError: if the latent's are not.
        """
        self._need("encoder", "compress")
        if not batch.isfinite().all():
            raise images.ImageError("image has values that are not finite; allowed: -1 to 1")

        def run(vae: nn.Module, padded: Tensor, batch: Tensor) -> Tensor:
            draw = (lambda mean: image_noise(batch, mean.shape).to(mean)) if is_sampled else None
            return encode(vae, padded, self.backbone.memory, draw)

        batch = batch.to(self.device)
        padded = pad_to_multiple(batch, multiple or self.backbone.factor)
        with without_tf32():
            return compute_finite("the latent", self.backbone.vae, run, padded, batch)

    def economise(self, analysis: Analysis, rate: RatePoint, effort: int) -> Analysis:
        """Encoder half: the analysis with indices that cost fewer bits (see `oscar.effort`)."""
        if effort == 0:
            return analysis
        table, model = self.frequencies[rate.id], self.contexts.get(rate.id)
        encoder = self.bottleneck.at(rate)
        with without_tf32():
            indices = cheaper_indices(encoder, analysis.latent, analysis.indices, effort, table, model)
        timesteps = analysis.timesteps
        if self.mapping.per_picture:
            timesteps = self.measure_timesteps(self.bottleneck.decode(indices, rate), analysis.latent)
        return analysis._replace(indices=indices, timesteps=timesteps)

    def synthesise(
        self, indices: Tensor, rms: Tensor, rate: RatePoint, timesteps: Tensor | None = None
    ) -> Reconstruction:
        """Decoder half: indices (B, rows, columns) and channel rms (B, 4) -> the padded images and what led there.

        Under a mapping that goes by picture it needs their timesteps (B,) too.
        """
        self._need("decoder", "decompress")
        z_hat = self.bottleneck.decode(indices, rate)
        x0 = self.denoise(z_hat, rms, rate, timesteps)
        return Reconstruction(indices, z_hat, x0, self.render(x0))

    def render(self, x0: Tensor) -> Tensor:
        """Denoised latent (B, 4, h, w) -> images in [-1, 1]."""
        vae, memory = self.backbone.vae if self.preview is None else self.preview, self.backbone.memory
        image = compute_finite("the decoded image", vae, lambda vae, x0: decode(vae, x0, memory), x0)
        return image.clamp_(-1, 1)

    def denoise(
        self, z_hat: Tensor, rms: Tensor, rate: RatePoint, timesteps: Tensor | float | None = None
    ) -> Tensor:
        """Rescale z_hat (B, 4, h, w) to the original's rms (B, 4) and denoise it in one step -> x0.

        The step is at the rate's timestep, or at `timesteps` (one, or B of them).
        """
        return self.denoiser(rescale(z_hat, rms), self.mapping(rate) if timesteps is None else timesteps)

    def measure_timesteps(self, z_hat: Tensor, latent: Tensor) -> Tensor:
        """The timesteps, int64 (B,), whose sqrt(alpha_bar) are nearest to the mean cosine similarity of z_hat and the
        latent (B, 4, h, w), among those that a file can say."""
        steps = len(self.backbone.schedule)
        timesteps = self.backbone.schedule.timestep_of_signal(channel_cosine(z_hat, latent).mean(dim=1))
        return timestep_of_code(timestep_code(timesteps, steps), steps)

    # Helpers.

    def _need(self, half: str, what: str) -> None:
        if self.half not in ("both", half):
            raise ValueError(f"half is {self.half!r}, which cannot {what}; allowed: both, {half}")

    def need_rates(self, what: str) -> None:
        """Refuse a model without rates (ValueError) where `what` needs them."""
        if not self.rates:
            raise ValueError(f"{what} is for models with rates; this one has a hyperprior, and a continuous quality")

    def find_rate(self, rate: float | RatePoint) -> RatePoint:
        """One of this model's rate points by nominal bpp (ValueError if it has no such rate)."""
        return find_rate(rate.bpp if isinstance(rate, RatePoint) else rate, self.rates)

    @property
    def points(self) -> tuple[float, ...]:
        """Numbers by which files of this model are asked for, from small to large: here rates, else qualities."""
        return tuple(sorted(rate.bpp for rate in self.rates))

    @property
    def default_point(self) -> float:
        """What files are written at unless something else is asked for."""
        return DEFAULT_RATE

    def find_point(self, point: float | RatePoint) -> RatePoint:
        """What names a size of files: here a rate, with a hyperprior a quality."""
        return self.find_rate(point)

    def stored_rms(self, codes: Tensor) -> Tensor:
        """The rms (B, 4) that a decoder reads from codes (B, 4) in a file."""
        return torch.from_numpy(dequantise_rms(codes.numpy().astype(np.uint8))).to(self.device)

    def stored_timesteps(self, containers: Sequence[Container]) -> Tensor | None:
        """The timesteps (B,) that a decoder reads from files, None where the rate determines them."""
        if not self.mapping.per_picture:
            return None
        steps = len(self.backbone.schedule)
        return torch.tensor([timestep_of_code(container.timestep, steps) for container in containers]).to(self.device)

    def estimated_bits(self, indices: Tensor, rate: RatePoint) -> float:
        """Ideal code length in bits of indices (rows, columns) under this model's table or context model, whichever is
        less, without header."""
        grid = indices.cpu().numpy()
        bits = entropy.estimated_bits(grid.reshape(-1), self.frequencies[rate.id])
        return min(bits, context.estimated_bits(grid, self.contexts[rate.id])) if rate.id in self.contexts else bits

    def examine(self, data: bytes) -> tuple[Container, float]:
        """The container of a file and the ideal code length in bits of its symbols, without header.

        Raises:
            BitstreamError: as `read`.
        """
        container, indices = self.read(data)
        return container, self.estimated_bits(torch.from_numpy(indices), container.rate)

    @property
    def device(self) -> torch.device:
        return next(self.bottleneck.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.bottleneck.parameters()).dtype


def as_batch(picture: Image.Image | np.ndarray | Tensor) -> Tensor:
    """A picture as (1, 3, H, W) in [-1, 1]; ImageError if no file can hold it."""
    batch = images.to_tensor(picture)
    height, width = batch.shape[-2:]
    if max(height, width) > MAX_SIDE:
        raise images.ImageError(f"picture of {width}x{height} pixels is not allowed; allowed: {MAX_SIDE} a side")
    return batch


def channel_rms(latent: Tensor) -> Tensor:
    """Root mean square over space of each channel: (B, C, h, w) -> (B, C), at least in float32."""
    return widen(latent).square().mean(dim=(2, 3)).sqrt()


def channel_cosine(z_hat: Tensor, latent: Tensor) -> Tensor:
    """Cosine similarity over space of each channel: two of (B, C, h, w) -> (B, C), float32 (paper section 3.1)."""
    return F.cosine_similarity(z_hat.float().flatten(2), latent.float().flatten(2), dim=2)


def rescale(z_hat: Tensor, rms: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale each channel of z_hat (B, C, h, w) to the rms (B, C) (paper section 3.2; there as norms over space)."""
    return z_hat * (rms / channel_rms(z_hat).clamp_min(eps))[:, :, None, None]
