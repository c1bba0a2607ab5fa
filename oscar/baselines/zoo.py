"""The learned codecs of CompressAI's zoo, with its published weights and real rANS bitstreams.

A file is 1 byte of quality, 4 bytes of image size, and the strings: first, if the architecture has it, that of the
hyper-latent z with its length in 3 bytes before it, then that of the latent y to the end. Images are padded at the
right and bottom to multiples of 64 by replicating their edge. torch and CompressAI are imported when a codec is made.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from oscar.baselines.base import BaselineUnavailable, CodecError, Encoded, ImageCodec, RoundTrip, check_choice
from oscar.baselines.framing import pack_size, split_size
from oscar.utils.errors import first_line
from oscar.utils.extras import need
from oscar.utils.lean_imports import quiet

if TYPE_CHECKING:
    from torch import nn

LABELS = {
    "bmshj2018-factorized": "Factorized prior (Ballé 2018)",
    "bmshj2018-hyperprior": "Hyperprior (Ballé 2018)",
    "mbt2018-mean": "Mean-scale hyperprior (Minnen 2018)",
    "mbt2018": "Joint autoregressive (Minnen 2018)",
    "cheng2020-anchor": "Cheng 2020 anchor",
    "cheng2020-attn": "Cheng 2020 attention",
}
_MULTIPLE = 64  # of the padded sides
_LENGTH = 3  # bytes of z's length


class ZooCodec(ImageCodec):
    """One architecture of the zoo at those of its qualities for which there are weights.

    Args:
        name: one of `LABELS`.
        metric: what the weights were trained for: mse or ms-ssim.
        weights: folder with the zoo's files under their published names; None is the cache of torch hub.
        download: fetch those of the architecture's files that the folder lacks.
        device: where the networks run. The autoregressive ones (mbt2018, cheng2020) decode rightly only on the kind of
            device that encoded.

    Raises:
        BaselineUnavailable: if there are no weights, fetching them fails, or CompressAI is not installed.
        ValueError: for another metric.
    """

    point_name = "quality"

    def __init__(
        self,
        name: str,
        metric: str = "mse",
        weights: str | Path | None = None,
        download: bool = False,
        device: str = "cpu",
    ):
        check_choice(name, "metric", metric, ("mse", "ms-ssim"))
        try:
            need("compressai")
            with quiet():
                from compressai.zoo.image import model_urls
        except ImportError as error:
            raise BaselineUnavailable(f"{name}: {first_line(error)}") from error
        self.name, self.label = name, LABELS[name]
        self.metric, self.device = metric, device
        self.folder = _hub_folder() if weights is None else Path(weights)
        files = {quality: self.folder / Path(url).name for quality, url in model_urls[name][metric].items()}
        if download:
            for quality, path in files.items():
                self._fetch(model_urls[name][metric][quality], path)
        self.files = {quality: path for quality, path in files.items() if path.is_file()}
        if not self.files:
            raise BaselineUnavailable(
                f"{name}: no weights in {self.folder}: put {files[1].name} and so on there, "
                "name their folder as weights, or allow download=true"
            )
        self.points = self.grid = tuple(self.files)
        self._networks: dict[int, nn.Module] = {}

    def _fetch(self, url: str, path: Path) -> None:
        import torch

        if path.is_file():
            return
        checksum = path.name.removesuffix(".pth.tar").rpartition("-")[2]  # start of the SHA-256
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=checksum, progress=False)
        except (OSError, RuntimeError) as error:
            raise BaselineUnavailable(f"{self.name}: cannot fetch {url}: {first_line(error)}") from error

    def network(self, quality: int) -> nn.Module:
        """The network of a quality, read at the first call."""
        if quality not in self._networks:
            self._networks[quality] = self._load(quality)
        return self._networks[quality]

    def _load(self, quality: int) -> nn.Module:
        import torch
        from compressai.zoo.image import model_architectures
        from compressai.zoo.pretrained import load_pretrained

        path = self.files[quality]
        try:
            state = load_pretrained(torch.load(path, map_location="cpu", weights_only=True))
            network = model_architectures[self.name].from_state_dict(state)
        except Exception as error:  # of the network, the file system, pickle or torch
            raise CodecError(f"{self.name}: weights {path} cannot be read: {first_line(error)}") from error
        network.update()  # the coder's tables, where the file lacks them
        return network.eval().requires_grad_(False).to(self.device)

    def encode(self, image: Image.Image, point: float) -> Encoded:
        import torch
        import torch.nn.functional as F
        from torchvision.transforms.functional import pil_to_tensor

        quality = int(self.check_point(point))
        size = pack_size(self.name, image)
        pixels = pil_to_tensor(image)[None].to(self.device).float() / 255
        padding = (0, -image.width % _MULTIPLE, 0, -image.height % _MULTIPLE)
        with torch.inference_mode():
            strings = self.network(quality).compress(F.pad(pixels, padding, mode="replicate"))["strings"]
        strings = [string[0] for string in strings]  # of the batch's only image
        lengths = b"".join(len(string).to_bytes(_LENGTH, "big") for string in strings[1:])
        header = bytes([quality]) + size + lengths
        parts = {"header": len(header)} | {layer: len(string) for layer, string in zip("yz", strings, strict=False)}
        return Encoded(header + b"".join(reversed(strings)), parts)

    def decode(self, data: bytes) -> Image.Image:
        import torch
        from torchvision.transforms.functional import to_pil_image

        (width, height), stream = split_size(self.name, data[1:])
        if data[0] not in self.files:
            raise CodecError(f"{self.name}: the file has quality {data[0]}, for which there are no weights here")
        network = self.network(data[0])
        strings = [stream]
        if self.name != "bmshj2018-factorized":
            length, stream = int.from_bytes(stream[:_LENGTH], "big"), stream[_LENGTH:]
            strings = [stream[length:], stream[:length]]
        if not all(strings):
            raise CodecError(f"{self.name}: the file is cut")
        shape = [(side + -side % _MULTIPLE) // network.downsampling_factor for side in (height, width)]
        with torch.inference_mode():
            pixels = network.decompress([[string] for string in strings], shape)["x_hat"]
        return to_pil_image((pixels[0, :, :height, :width] * 255).round().clamp(0, 255).byte().cpu())

    def round_trip(self, image: Image.Image, point: float) -> RoundTrip:
        self.network(int(self.check_point(point)))  # reading weights is no part of the time
        return super().round_trip(image, point)

    def describe(self) -> dict:
        from importlib.metadata import version

        return {
            **super().describe(),
            "library": f"compressai {version('compressai')}",
            "metric": self.metric,
            "device": self.device,
            "weights": {str(quality): path.name for quality, path in self.files.items()},
            "sha256": {str(quality): _sha256(path) for quality, path in self.files.items()},
        }


def _hub_folder() -> Path:
    """Where torch hub keeps weights."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


@lru_cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
