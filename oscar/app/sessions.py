"""What the page remembers of its visitors, in memory alone and until they leave, and what it does for them."""

from __future__ import annotations

import base64
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image

from oscar.app.coding import Coded, Model, Scale, compare, find_model
from oscar.app.uploads import Upload, read_upload
from oscar.data.images import ImageError, srgb_mark

CAPACITY = 32  # visitors at a time; the one who has been idle longest is forgotten first
SIZE = "Size"  # what the slider chooses, or else an operating point
_MIME = {"AVIF": "image/avif", "WebP": "image/webp", "JPEG": "image/jpeg"}  # files that browsers show as they are


class Wish(NamedTuple):
    """What a visitor wants to see: the model, what the slider chooses, and its number."""

    model: str
    aim: str
    amount: float


@dataclass
class View:
    """What the viewer shows.

    Attributes:
        data: our file.
        coded: by codec, ours first.
        downloads: names of the files to save: of the `.oscar` file (None if the visitor has it), and of the image.
        has_original: whether there is an original beside it.
    """

    data: bytes
    coded: list[Coded]
    downloads: tuple[str | None, str]
    has_original: bool

    def as_json(self) -> dict[str, Any]:
        """For `viewer.js`; images are data URLs."""
        size, (packed, image) = self.coded[0].image.size, self.downloads
        return {
            "width": size[0],
            "height": size[1],
            "original": self.has_original,
            "entries": [_entry(coded, len(self.data)) for coded in self.coded],
            "packed": packed and {"name": packed, "url": _data_url(self.data, "application/octet-stream")},
            "image": image,
        }


def _entry(coded: Coded, ours: int) -> dict[str, Any]:
    size = len(coded.data)
    too_large = coded.bound is not None and size > coded.bound
    return {
        "label": coded.label,
        "setting": f"at its smallest, {size / ours:.1f} × ours" if too_large else coded.setting,
        "larger": too_large,
        "bytes": f"{size:,}",
        "bpp": f"{coded.bpp:.4f}",
        "psnr": "–" if coded.psnr is None else f"{coded.psnr:.2f}",
        "ms_ssim": "–" if coded.ms_ssim is None else f"{coded.ms_ssim:.4f}",
        "url": _data_url(coded.data, _MIME[coded.label]) if coded.label in _MIME else image_url(coded.image),
    }


def image_url(image: Image.Image) -> str:
    """The pixels of an image, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4, **srgb_mark("PNG"))
    return _data_url(buffer.getvalue(), "image/png")


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Session:
    """One visitor's image or file, and what was made of it."""

    def __init__(self, models: Mapping[str, Model]):
        self.models = models
        self.upload: Upload | None = None
        self.wish: Wish | None = None
        self.asked = self.served = 0  # wishes: how many there were, and which was the last to be served
        self.data = b""
        self.view: View | None = None

    @property
    def original(self) -> Image.Image | None:
        return self.upload.image if self.upload else None

    def open(self, data: bytes, name: str, model: str, aim: str) -> Scale | None:
        """Take an upload in the place of the one before, which stays if this one is refused.

        Returns:
            What the slider goes over for an image; None for an `.oscar` file, which the model that wrote it decodes.

        Raises:
            ValueError: in one line that begins with the name, if it is damaged, too large or foreign.
        """
        upload = read_upload(data, name)
        if upload.data is not None:
            try:
                writer = find_model(self.models, upload.data, name)
            except ImageError:
                raise
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            self.upload, self.data, self.view, self.wish = upload, upload.data, None, None
            self.ask(Wish(writer.name, aim, 0))
            return None
        self.upload, self.data, self.view, self.wish = upload, b"", None, None
        return self.choose(model, aim, None)

    def choose(self, model: str, aim: str, number: float | None) -> Scale:
        """Have the image by another model or another aim; the slider starts at `number` if it is one of its own."""
        assert self.original is not None
        scale = self.models[model].sizes(self.original) if aim == SIZE else self.models[model].points()
        if (
            number is not None and self.wish is not None and self.wish.aim == aim == SIZE
        ):  # equal bytes by another model
            scale = replace(scale, start=min(max(number, scale.low), scale.high))
        self.ask(Wish(model, aim, scale.start))
        return scale

    def ask(self, wish: Wish) -> None:
        """Note what is wanted, unless it was wanted already; what is still being done for an earlier wish stops."""
        if wish != self.wish:
            self.wish, self.asked = wish, self.asked + 1

    def serve(self) -> Iterator[View]:
        """What was asked for last, more and more of it; nothing if that was served already."""
        turn, upload, wish = self.asked, self.upload, self.wish
        if turn == self.served or upload is None or wish is None:
            return
        self.served = turn
        model, image = self.models[wish.model], upload.image
        if image is None:
            self.view = View(self.data, [model.decode(self.data)], (None, f"{upload.stem}.png"), False)
            yield self.view
            return
        amount = {"max_bytes": int(wish.amount)} if wish.aim == SIZE else {"place": wish.amount}
        self.data = model.compress(image, **amount)
        ours = model.decode(self.data, image)
        self.view = View(self.data, [ours], (f"{upload.stem}.oscar", f"{upload.stem}-{model.name}.png"), True)
        yield self.view
        for coded in compare(image, len(self.data)):
            if turn != self.asked:
                return
            self.view.coded.append(coded)
            yield self.view

    def preview(self, share: float) -> View | None:
        """The view with what a share (0 to 1) of our file shows, if there is a file."""
        if self.view is None or self.wish is None:
            return None
        if share >= 1:
            return self.view
        part = self.models[self.wish.model].decode_part(self.data, share, self.original)
        return replace(self.view, coded=[part, *self.view.coded[1:]])

    @property
    def has_previews(self) -> bool:
        return self.wish is not None and bool(self.data) and self.models[self.wish.model].has_previews(self.data)


class Sessions:
    """Visitors by the key that their browser was given."""

    def __init__(self, models: Mapping[str, Model], capacity: int = CAPACITY):
        self.models, self.capacity = models, capacity
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, key: str) -> Session:
        """A visitor's session, a new one if there is none."""
        with self._lock:
            session = self._sessions.pop(key, None) or Session(self.models)
            self._sessions[key] = session
            while len(self._sessions) > self.capacity:
                self._sessions.popitem(last=False)
            return session

    def end(self, key: str) -> None:
        """Forget a visitor and all that is theirs."""
        with self._lock:
            self._sessions.pop(key, None)
