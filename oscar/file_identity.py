"""How a model names itself in its files, and which files it takes for its own. No torch."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any, NamedTuple

from PIL import Image

from oscar.bitstream import Container, HeaderError, Payload, WrongModelError
from oscar.operating_points import Point
from oscar.timesteps import TimestepMapping


class Preview(NamedTuple):
    """What a part of a file shows: the image, and the share of its symbols that was read, 0 to 1."""

    image: Image.Image
    share: float


class FileIdentity:
    """The part of a codec that opens files.

    Attributes:
        bottleneck: `OperatingPoints`.
        mapping: pseudo-timesteps.
    """

    bottleneck: Any
    mapping: TimestepMapping

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of what decoding depends on, in hexadecimal."""

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels per latent position along each side."""

    @property
    def points(self) -> tuple[float, ...]:
        """Numbers by which files are asked for, from small to large."""
        return tuple(point.value for point in self.bottleneck.points)

    @property
    def model_tag(self) -> int:
        """The first 16 bits of the fingerprint, by which most files name their model."""
        return int(self.fingerprint[:4], 16)

    def file_tag(self, payload: Payload, point: Point) -> int:
        """The tag that a file carries: `model_tag`, or 16 bits that depend on what its coding needs beyond, too."""
        more = self.bottleneck.digest(payload.coding, point)
        digest = hashlib.sha256(bytes.fromhex(self.fingerprint) + more).digest()
        return int.from_bytes(digest[:2], "big") if more else self.model_tag

    def open(self, data: bytes, whole: bool = True) -> tuple[Container, Point]:
        """Bytes of a file, or unless `whole` of its start -> header and operating point, if this model wrote it.

        Raises:
            BitstreamError: if it is damaged, foreign, or was written with another model.
        """
        container = Container.unpack(data, whole)
        if container.coding not in self.bottleneck.codings:
            raise WrongModelError(
                f"the file was written by a model with {container.coding.model}; "
                f"this one has {self.bottleneck.codings[0].model}"
            )
        point = self.bottleneck.point_of_code(container.point_code)
        tag = self.file_tag(container.coded, point)
        if container.model_tag != tag:
            raise WrongModelError(f"the file was written with model {container.model_tag:04x}; this model is {tag:04x}")
        if (container.timestep is not None) != self.mapping.per_image:
            has, wants = ("no", "one") if self.mapping.per_image else ("a", "none")
            raise HeaderError(f"the file has {has} timestep of its own; allowed for this model: {wants}")
        return container, point

    def latent_shape(self, container: Container) -> tuple[int, int]:
        """Rows and columns of the latent of a file's image, before padding to the bottleneck's multiple."""
        return -(-container.height // self.factor), -(-container.width // self.factor)
