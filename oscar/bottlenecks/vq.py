"""The paper's bottleneck: one hyper-encoder per rate, indices in files, norms beside them (paper section 3.2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from oscar.bitstream import Coding
from oscar.bitstream.context import ContextModel, decode_grid, decode_prefix, encode_grid
from oscar.bitstream.context import estimated_bits as context_bits
from oscar.bitstream.entropy import check_frequencies, estimated_bits, normalise_counts, uniform_frequencies
from oscar.bitstream.norms import dequantise_rms, quantise_rms
from oscar.bitstream.rdo import check_effort, optimise_indices
from oscar.bottlenecks.base import Bottleneck, Components, Draw, Output, Payload, channel_cosines, cosine_spatial
from oscar.bottlenecks.hyper_encoder import HyperEncoder
from oscar.config import IMAGE_FIELDS, VQ, ConfigError, fill, take
from oscar.diffusion import NoiseSchedule
from oscar.metrics.protocol import PAPER_MULTIPLE
from oscar.models.modules import check_tensors, count, drop
from oscar.models.precision import compute_finite, widen
from oscar.operating_points import Rates
from oscar.rates import PAPER_RATES, PIXELS_PER_LATENT, RatePoint, rate_by_id
from oscar.registry import BOTTLENECKS
from oscar.timesteps import TimestepMapping, mapping_from_config
from oscar.utils.errors import first_line
from oscar.utils.rng import StepRng, choose_points

if TYPE_CHECKING:
    from oscar.config import BottleneckConfig, StageConfig

_TRAINING_ONLY = ("cluster_size", "embed_avg", "initted")
_DECODER_HALF = (".quantizer._codebook.embed", ".quantizer.project_out.", ".proj.")
# Modules of a hyper-encoder and of its quantiser that a half of the codec does without.
_UNUSED = {"both": (), "encoder": ("proj", "project_out"), "decoder": ("backbone", "project_in")}


class VQSymbols(NamedTuple):
    """What a file of a rate holds.

    Attributes:
        indices: code indices, int64 (B, rows, columns).
        rms: root mean square of each channel of the original latent (B, 4): its norm over the root of h * w.
    """

    indices: Tensor
    rms: Tensor


@BOTTLENECKS.register("vq")
class VQBottleneck(Rates, Bottleneck):
    """The hyper-encoders of several rates, and how their indices are coded.

    Args:
        rates: rate points, each with a hyper-encoder of its own.
        latent_channels: channels of the latent.
        codebook_sizes: codebook size by rate id where it departs from the rate's (as the 8196 of the published code).
        options: further arguments of `HyperEncoder`.

    Attributes:
        options: these further arguments.
        frequencies: integer frequency table by rate id, int32 (K,), uniform until indices were counted.
        contexts: context model by rate id, for rates whose indices one predicts.
    """

    config_fields = (
        "rates",
        "width",
        "features",
        "codebook_dim",
        "kmeans_init",
        "dead_code_threshold",
        "decay",
        "rotation_trick",
    )
    stage_fields = {
        "bottleneck": ("cosine", "commitment", "sample_latents", "independent_rates", "rates_per_step", "rate_order",
                  "rate_weights", "table_batches"),
        "joint": (*IMAGE_FIELDS, "cosine", "commitment", "sample_latents", "latent", "gan", "rate_order",
                  "rate_weights", "table_batches", "vae", "denoiser"),
        "context": ("rate_weights", "context"),
    }  # fmt: skip
    validation_field = "rates"
    factor = PIXELS_PER_LATENT
    is_published = True
    per_image_timesteps = True

    def __init__(
        self,
        rates: Sequence[RatePoint] = PAPER_RATES,
        latent_channels: int = 4,
        codebook_sizes: Mapping[int, int] | None = None,
        **options,
    ):
        super().__init__()
        sizes = codebook_sizes or {}
        self.rates = tuple(rates)
        self.latent_channels = latent_channels
        self.options = options
        self.hyper_encoders = nn.ModuleDict(
            {
                str(rate.id): HyperEncoder(
                    rate, latent_channels=latent_channels, codebook_size=sizes.get(rate.id), **options
                )
                for rate in self.rates
            }
        )
        self.frequencies = {rate.id: uniform_frequencies(self.at(rate).codebook_size) for rate in self.rates}
        self.contexts: dict[int, ContextModel] = {}
        self.cosine_loss = cosine_loss_spatial

    def at(self, rate: RatePoint) -> HyperEncoder:
        """The hyper-encoder of a rate."""
        return self.hyper_encoders[str(rate.id)]

    # The two halves.

    def quantise(self, latent: Tensor, point: RatePoint, effort: int = 0) -> VQSymbols:
        indices = self.at(point).encode(latent)
        if check_effort(effort):
            indices = self._cheaper(latent, indices, point, effort)
        return VQSymbols(indices, channel_rms(latent))

    @torch.no_grad()
    def _cheaper(self, latent: Tensor, indices: Tensor, point: RatePoint, effort: int) -> Tensor:
        """The indices with cheaper ones in the place of some; see `oscar.bitstream.rdo`."""
        encoder, table, model = self.at(point), self.frequencies[point.id], self.contexts.get(point.id)
        features = encoder.codebook_features(latent).float()
        codebook = encoder.quantizer.codebook.float().cpu().numpy()
        grids = [
            optimise_indices(own, codebook, grid, effort, table, model)
            for own, grid in zip(features.cpu().numpy(), indices.cpu().numpy(), strict=True)
        ]
        return torch.from_numpy(np.stack(grids).astype(np.int64)).to(indices.device)

    def dequantise(self, symbols: VQSymbols, point: RatePoint) -> Tensor:
        # Networks keep the order in memory of their input; on a CPU, torch's normalisations are most exact in this one.
        encoder = self.at(point)
        z_hat = compute_finite("the quantised latent", encoder, HyperEncoder.decode, symbols.indices)
        return rescale(z_hat.contiguous(), symbols.rms)

    def check_published(self, point: RatePoint, height: int, width: int) -> None:
        if height % point.pixels_per_index or width % point.pixels_per_index:
            raise ValueError(
                f"images of {width}x{height} pixels are not allowed in protocol paper, which does not "
                f"pad; allowed: sides that are multiples of {PAPER_MULTIPLE}"
            )

    def stored(self, symbols: VQSymbols, point: RatePoint) -> VQSymbols:
        return symbols._replace(rms=self._rms(quantise_rms(symbols.rms.float().cpu().numpy())))

    def write(self, symbols: VQSymbols, point: RatePoint, newest: Coding = Coding.CONTEXT) -> list[Payload]:
        """Symbols -> payloads, each in the shortest coding up to the newest allowed."""
        norms = quantise_rms(symbols.rms.float().cpu().numpy())
        table, model = self.frequencies[point.id], self.contexts.get(point.id)
        coded = [encode_grid(grid, table, model, newest) for grid in symbols.indices.cpu().numpy()]
        return [Payload(coding, norm.tobytes(), data) for (coding, data), norm in zip(coded, norms, strict=True)]

    def read(self, payload: Payload, point: RatePoint, shape: tuple[int, int]) -> VQSymbols:
        table, model = self.frequencies[point.id], self.contexts.get(point.id)
        grid = decode_grid(payload.data, payload.coding, self.grid_shape(point, shape), table, model)
        return self._symbols(grid, payload)

    def read_prefix(self, payload: Payload, point: RatePoint, shape: tuple[int, int]) -> tuple[VQSymbols, float]:
        if payload.coding != Coding.CONTEXT:
            return super().read_prefix(payload, point, shape)
        grid, share = decode_prefix(payload.data, self.grid_shape(point, shape), self.contexts[point.id])
        return self._symbols(grid, payload), share

    def estimated_bits(self, symbols: VQSymbols, point: RatePoint) -> list[float]:
        """Ideal code length under the rate's table or context model, whichever is less."""
        model, result = self.contexts.get(point.id), []
        for grid in symbols.indices.cpu().numpy():
            bits = estimated_bits(grid.reshape(-1), self.frequencies[point.id])
            result.append(bits if model is None else min(bits, context_bits(grid, model)))
        return result

    def _symbols(self, grid: np.ndarray, payload: Payload) -> VQSymbols:
        device = next(self.parameters()).device
        indices = torch.from_numpy(grid.astype(np.int64)[None]).to(device)
        return VQSymbols(indices, self._rms(np.frombuffer(payload.side, dtype=np.uint8)[None]))

    def _rms(self, codes: np.ndarray) -> Tensor:
        return torch.from_numpy(dequantise_rms(codes)).to(next(self.parameters()).device)

    def parameter_counts(self) -> list[tuple[str, float | None, int, str | None]]:
        rows: list[tuple[str, float | None, int, str | None]] = []
        for rate in self.rates:
            coder = self.at(rate)
            quantizer = coder.quantizer
            rows += [
                ("bottleneck_encoder", rate.bpp, count(coder.backbone, quantizer.project_in), None),
                ("bottleneck_decoder", rate.bpp, count(coder.proj, quantizer.project_out), None),
                ("codebook", rate.bpp, quantizer.codebook.numel(), None),
            ]
        return rows

    @torch.no_grad()
    def judge(self, symbols: VQSymbols, point: RatePoint, latent: Tensor) -> tuple[float, np.ndarray]:
        """Of the quantised latent before it is rescaled, as stage 1 trains it."""
        encoder = self.at(point)
        uses = np.bincount(symbols.indices.flatten().cpu().numpy(), minlength=encoder.codebook_size)
        return cosine_spatial(encoder.decode(symbols.indices), latent).item(), uses

    # Checkpoints.

    def to_config(self) -> dict:
        encoders = {str(rate.id): self.at(rate) for rate in self.rates}
        sizes = {
            key: encoder.codebook_size
            for key, encoder in encoders.items()
            if encoder.codebook_size != encoder.rate.codebook_size
        }
        return {"rates": [rate.id for rate in self.rates], "codebook_sizes": sizes, **self.options}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], latent_channels: int) -> VQBottleneck:
        options = {name: value for name, value in config.items() if name != "kind"}
        rates = [rate_by_id(rate_id) for rate_id in options.pop("rates")]
        sizes = {int(key): size for key, size in options.pop("codebook_sizes", {}).items()}
        return cls(rates, latent_channels, sizes, **options)

    def tensors(self) -> dict[str, Tensor]:
        found = {name: value for name, value in super().tensors().items() if not name.endswith(_TRAINING_ONLY)}
        for rate_id, table in self.frequencies.items():
            found[f"frequencies.{rate_id}"] = torch.from_numpy(np.asarray(table, dtype=np.int32).copy())
        for rate_id, model in self.contexts.items():
            arrays = model.arrays().items()
            found |= {f"context.{rate_id}.{name}": torch.from_numpy(value.copy()) for name, value in arrays}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        check_tensors(
            *(
                {name: value for name, value in given.items() if not name.startswith("context.")}
                for given in (tensors, self.tensors())
            )
        )
        weights = {
            name.removeprefix("bottleneck."): value for name, value in tensors.items() if name.startswith("bottleneck.")
        }
        self.load_state_dict(weights, strict=False, assign=any(value.is_meta for value in self.state_dict().values()))
        models: dict[str, dict[str, np.ndarray]] = {}
        for name, value in tensors.items():
            prefix, _, rest = name.partition(".")
            try:
                if prefix == "frequencies":
                    self.frequencies[int(rest)] = check_frequencies(value.numpy())
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if prefix == "context":
                rate_id, _, part = rest.partition(".")
                models.setdefault(rate_id, {})[part] = value.numpy()
        self.contexts = {int(rate_id): self._context(rate_id, arrays) for rate_id, arrays in models.items()}
        for rate in self.rates:
            if not any(buffer.is_meta for buffer in self.at(rate).buffers()):
                self.at(rate).keep_codes()

    def _context(self, rate_id: str, arrays: dict[str, np.ndarray]) -> ContextModel:
        try:
            model = ContextModel(**arrays)
        except (TypeError, ValueError) as error:
            raise ValueError(f"context.{rate_id}: {first_line(error)}") from None
        sizes = {str(rate.id): self.at(rate).codebook_size for rate in self.rates}
        if sizes.get(rate_id) != model.codebook_size:
            raise ValueError(
                f"context.{rate_id} is for {model.codebook_size} codes; "
                f"allowed: {sizes.get(rate_id, 'none, as there is no such rate')}"
            )
        return model

    def decoder_tensors(self) -> set[str]:
        return {
            name
            for name in self.tensors()
            if name.startswith("frequencies.")
            or not name.startswith("context.")
            and any(part in name for part in _DECODER_HALF)
        }

    def keep(self, components: Components, both_needed: bool = False) -> None:
        if components == "encoder" and both_needed:
            return
        for rate in self.rates:
            drop(self.at(rate), _UNUSED[components])
            drop(self.at(rate).quantizer, _UNUSED[components])

    # Configurations.

    @classmethod
    def complete(cls, config: BottleneckConfig) -> None:
        fill(config, VQ)

    @classmethod
    def describe(cls, config: BottleneckConfig) -> dict[str, Any]:
        own = {name: getattr(config, name) for name in ("width", "features", "codebook_dim", "kmeans_init")}
        own["rates"] = [rate.id for rate in config.rate_points()]
        return {**own, **config.training_options()}

    @classmethod
    def is_known(cls, config: BottleneckConfig) -> bool:
        return config.rates is not None

    @classmethod
    def take_over(cls, config: BottleneckConfig, stored: Mapping[str, Any]) -> None:
        names = {rate_id: rate_by_id(rate_id).bpp for rate_id in stored["rates"]}
        if config.rates is not None:
            for rate in config.rate_points():
                if rate.id not in names:
                    raise ConfigError(
                        f"bottleneck.rates has {rate.bpp}, which init_from lacks; "
                        f"allowed: null, or some of {', '.join(map(str, names.values()))}"
                    )
        else:
            config.rates = list(names.values())
        take(config, "bottleneck", {name: stored.get(name, VQ[name]) for name in VQ if name != "rates"})

    @classmethod
    def check_stage(cls, config: BottleneckConfig, stage: StageConfig) -> None:
        if stage.name == "bottleneck" and not stage.cosine:
            raise ConfigError("stage.cosine is 0; allowed: above 0 in stage bottleneck")
        weights = stage.draw_weights(config.rate_points())
        drawn = len(weights) - weights.count(0)
        if stage.rates_per_step is not None and not 1 <= stage.rates_per_step <= drawn:
            raise ConfigError(f"stage.rates_per_step is {stage.rates_per_step}; allowed: 1 to {drawn}, the rates drawn")
        if stage.rate_order == "balanced":
            if stage.name == "bottleneck" and stage.rates_per_step is None:
                raise ConfigError(
                    "stage.rate_order is 'balanced', but stage.rates_per_step is unset and so every step "
                    "trains all rates; allowed there: random"
                )
            if len(set(weights) - {0.0}) > 1:
                raise ConfigError(
                    "stage.rate_order is 'balanced', but stage.rate_weights differ; "
                    "allowed there: one weight for all, and 0"
                )

    @classmethod
    def default_mapping(cls, config: BottleneckConfig) -> TimestepMapping:
        """The paper's table; rates that are not in it, which stage 1 trains for `oscar add-rates`, lie between its."""
        return mapping_from_config({"kind": "table", "timesteps": "paper"}, config.rate_points())

    # Training.

    def adapt(self, config: BottleneckConfig) -> None:
        """Fewer rates."""
        self.select(config.rate_points())

    def configure(self, config: BottleneckConfig, stage: StageConfig, factor: int) -> None:
        for rate in self.rates:
            self.at(rate).set_training(**config.training_options())
        self.draw_weights = stage.draw_weights(self.rates)
        self.rates_per_step, self.rate_order = stage.rates_per_step, stage.rate_order
        self.cosine_loss = cosine_loss_channel if stage.name == "joint" else cosine_loss_spatial

    def draw(self, rng: StepRng, latent: Tensor, every: bool) -> list[Draw]:
        count = self.rates_per_step if every else 1
        rates = choose_points(rng, self.rates, self.draw_weights, count, self.rate_order)
        return [Draw(rate, self.label(rate)) for rate in rates]

    def columns(self) -> tuple[str, ...]:
        names = ("loss", "cosine", "perplexity")
        return ("cosine", "commitment", *(f"{name}_{self.label(rate)}" for name in names for rate in self.rates))

    def forward(self, latent: Tensor, point: RatePoint) -> Output:
        encoder = self.at(point)
        z_hat, _, commitment = encoder(latent)
        # Norms and targets carry no gradient: a trained encoder could else grow its latents until the denoiser hardly
        # counts, or drift towards what is easy to quantise.
        target = latent.detach()
        rescaled = rescale(z_hat, channel_rms(target))
        losses = {"cosine": self.cosine_loss(z_hat, target), "commitment": commitment}
        return Output(rescaled, losses, {"perplexity": perplexity(encoder.usage())})

    def compiled_networks(self) -> list[nn.Module]:
        return [part for rate in self.rates for part in (self.at(rate).backbone, self.at(rate).proj)]

    def independent_parts(self) -> list[list[nn.Parameter]]:
        return [list(self.at(rate).parameters()) for rate in self.rates]

    @torch.no_grad()
    def finish(self, latents: Iterable[Tensor], schedule: NoiseSchedule | None = None) -> None:
        """Count every rate's indices and store the tables; context models are dropped, as those of other indices."""
        counts = {rate.id: np.zeros(self.at(rate).codebook_size, dtype=np.int64) for rate in self.rates}
        for latent in latents:
            for rate in self.rates:
                indices = self.at(rate).encode(latent).cpu().numpy().reshape(-1)
                counts[rate.id] += np.bincount(indices, minlength=len(counts[rate.id]))
        self.frequencies = {rate_id: normalise_counts(count) for rate_id, count in counts.items()}
        self.contexts = {}

    @contextlib.contextmanager
    def ready_to_code(self) -> Iterator[None]:
        """Within it files are coded with tables of the quantisers' moving averages."""
        kept, self.frequencies = self.frequencies, self.running_frequencies()
        try:
            yield
        finally:
            self.frequencies = kept

    def running_frequencies(self) -> dict[int, np.ndarray]:
        """Tables by rate id from the quantisers' moving averages."""
        averages = {rate.id: self.at(rate).usage().double().cpu().numpy() for rate in self.rates}
        return {
            rate_id: normalise_counts(np.rint(usage * 2**16).astype(np.int64)) for rate_id, usage in averages.items()
        }

    def select(self, rates: Sequence[RatePoint]) -> None:
        """Drop the hyper-encoders, tables and context models of all other rates."""
        self.rates = tuple(rates)
        self.hyper_encoders = nn.ModuleDict({str(rate.id): self.at(rate) for rate in self.rates})
        self.frequencies = {rate.id: self.frequencies[rate.id] for rate in self.rates}
        self.contexts = {rate.id: self.contexts[rate.id] for rate in self.rates if rate.id in self.contexts}


def need_rates(bottleneck: Bottleneck, what: str) -> VQBottleneck:
    """The bottleneck, if it is the paper's (ValueError naming `what` it is needed for)."""
    if not isinstance(bottleneck, VQBottleneck):
        raise ValueError(f"{what} is for models with rates; this one has {bottleneck.point_words}")
    return bottleneck


def channel_rms(latent: Tensor) -> Tensor:
    """Root mean square over space of each channel: (B, C, h, w) -> (B, C), at least in float32."""
    return widen(latent).square().mean(dim=(2, 3)).sqrt()


def rescale(z_hat: Tensor, rms: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale each channel of z_hat (B, C, h, w) to the rms (B, C) (paper section 3.2; there as norms over space)."""
    return z_hat * (rms / channel_rms(z_hat).clamp_min(eps))[:, :, None, None]


def cosine_loss_spatial(z_hat: Tensor, z0: Tensor) -> Tensor:
    """Minus the mean cosine of the vectors over channels, one per position (paper, stage 1)."""
    return -cosine_spatial(z_hat, z0)


def cosine_loss_channel(z_hat: Tensor, z0: Tensor) -> Tensor:
    """Minus the mean cosine of the vectors over space, one per channel (paper, stage 2)."""
    return -channel_cosines(z_hat, z0).mean()


def perplexity(usage: Tensor) -> Tensor:
    """exp of the entropy of uses (K,), counts or averages of any scale: K if all codes are used alike, 1 if one is."""
    share = usage / usage.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.special.entr(share).sum().exp()
