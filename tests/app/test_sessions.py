"""What the page does with uploads, models and other codecs, without Gradio and without a browser."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from oscar.app import uploads
from oscar.app.coding import BASELINES, Model
from oscar.app.sessions import SIZE, Session, Sessions, Wish
from oscar.app.uploads import MAX_BYTES, read_upload
from oscar.baselines import make_baseline
from oscar.data.images import ImageError
from oscar.inference.load import load
from oscar.metrics.image import psnr


def as_file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: Model(name, load(name)) for name in ("nano-vq", "nano")}


@pytest.fixture(scope="module")
def photo(photographs) -> Image.Image:
    return photographs["chelsea"].crop((100, 40, 292, 216))  # 192x176: MS-SSIM needs 161


@pytest.fixture
def session(models, photo) -> Session:
    session = Session(models)
    session.open(as_file(photo), "cat.png", "nano-vq", SIZE)
    return session


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


# Uploads


GREY = Image.new("L", (8, 8), 90)
NOISE = Image.effect_noise((40, 40), 50)


@pytest.mark.parametrize(
    ("data", "name", "reason"),
    [
        (b"", "a.png", "a.png: not an image of a known format"),
        (b"nonsense", "a.png", "a.png: not an image of a known format"),
        (as_file(NOISE)[:500], "a.png", "a.png: cannot be read as an image: "),
        (as_file(GREY, "EPS"), "a.png", "a.png: is EPS; allowed: AVIF, BMP, "),
        (as_file(Image.new("1", (2049, 2048))), "a.png", "a.png: has 2049x2048 pixels; allowed: 4,194,304 in all"),
        (as_file(Image.new("1", (20000, 20000))), "a.png", "a.png: has too many pixels; allowed: 4,194,304"),
        (bytes(MAX_BYTES + 1), "a.png", "a.png: has 33,554,433 bytes; allowed: 33,554,432"),
    ],
    ids=["empty", "foreign", "cut", "eps", "large", "bomb", "long"],
)
def test_bad_uploads_are_one_line(data, name, reason):
    with pytest.raises(ImageError) as error:
        read_upload(data, name)
    assert str(error.value).startswith(reason) and "\n" not in str(error.value)


def test_large_images_are_refused_by_their_header(monkeypatch):
    monkeypatch.setattr(uploads, "read_image", lambda *args, **options: pytest.fail("pixels were read"))
    with pytest.raises(ImageError, match="allowed: 4,194,304"):
        read_upload(as_file(Image.new("1", (4096, 4096))), "a.png")


def test_what_was_done_to_an_image_is_said():
    glass = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    upload = read_upload(as_file(glass), "glass.png")
    assert upload.note == "transparent parts were laid on white" and upload.image.getpixel((0, 0)) == (255, 127, 127)
    film = as_file(GREY, "GIF", save_all=True, append_images=[Image.new("L", (8, 8), level) for level in (0, 255)])
    upload = read_upload(film, "film.gif")
    assert upload.note == "the first of 3 frames was taken" and upload.image.getpixel((0, 0)) == (90, 90, 90)
    assert read_upload(as_file(GREY), "a.b.png").note == "" and read_upload(as_file(GREY), "a.b.png").stem == "a.b"


# One visitor


def test_an_image_is_shown_beside_other_codecs(session, models, photo):
    *_, view = session.serve()
    assert [coded.label for coded in view.coded] == ["OSCAR nano-vq", "AVIF", "WebP", "JPEG"]
    ours = view.coded[0]
    assert ours.data == view.data == session.data and len(ours.data) <= session.wish.amount
    assert np.array_equal(ours.image, models["nano-vq"].codec.decompress(view.data))
    for coded, name in zip(view.coded[1:], BASELINES, strict=True):
        assert coded.psnr == psnr(photo, make_baseline(name).decode(coded.data)) and 0 < coded.ms_ssim < 1
    shown = view.as_json()
    assert (shown["width"], shown["height"], shown["original"]) == (192, 176, True)
    assert shown["packed"]["name"] == "cat.oscar" and shown["image"] == "cat-nano-vq.png"
    assert base64.b64decode(shown["packed"]["url"].partition(",")[2]) == view.data
    assert np.array_equal(pixels(shown["entries"][0]["url"]), ours.image)
    for entry, coded in zip(
        shown["entries"][1:], view.coded[1:], strict=True
    ):  # files that are larger than ours say so
        assert entry["larger"] == (len(coded.data) > len(view.data)) == ("× ours" in entry["setting"])
        assert base64.b64decode(entry["url"].partition(",")[2]) == coded.data
    assert list(session.serve()) == []  # until something else is asked for


def test_other_codecs_get_as_many_bytes(session):
    session.choose("nano", "Quality", None)
    session.ask(Wish("nano", "Quality", 1.0))
    *_, view = session.serve()
    assert view.coded[0].setting == "quality 1.0000"
    assert [len(coded.data) <= len(view.data) == coded.bound for coded in view.coded[1:]] == [True] * 3


@pytest.mark.parametrize(("place", "rate"), [(1, 0.0019), (8, 0.125)])
def test_few_points_are_numbered(session, place, rate):
    scale = session.choose("nano-vq", "Rate", None)
    assert (scale.low, scale.high, scale.step, scale.start) == (1, 8, 1, 5)
    session.ask(Wish("nano-vq", "Rate", place))
    view = next(session.serve())
    assert view.coded[0].setting == f"rate {rate:.4f}"


def test_another_model_starts_at_the_same_size(session):
    sizes = session.choose("nano-vq", SIZE, None)
    assert session.choose("nano", SIZE, sizes.high).start == sizes.high
    assert session.choose("nano-vq", SIZE, 10**6).start == sizes.high == session.wish.amount  # or as near as it can be


def test_a_later_wish_stops_the_earlier(session):
    session.choose("nano-vq", SIZE, None)  # as before: no other wish
    assert session.asked == 1
    serving = session.serve()
    assert len(next(serving).coded) == 1
    session.ask(Wish("nano-vq", "Rate", 1))
    assert list(serving) == []
    assert next(session.serve()).coded[0].setting == "rate 0.0019"


def test_a_file_is_decoded_by_the_model_that_wrote_it(session, models, photo):
    data = models["nano"].codec.compress(photo, quality=0.3)
    assert session.open(data, "cat.oscar", "nano-vq", SIZE) is None
    (view,) = session.serve()
    assert view.coded[0].label == "OSCAR nano" and view.coded[0].psnr is None and not view.has_original
    assert np.array_equal(view.coded[0].image, models["nano"].codec.decompress(data))
    assert view.downloads == (None, "cat.png")


def test_previews(session):
    *_, view = session.serve()
    assert session.has_previews
    scores = [session.preview(share).coded[0].psnr for share in (0, 0.4, 1)]
    assert scores == sorted(scores) and scores[-1] == view.coded[0].psnr
    part = session.preview(0.4)
    assert view.data.startswith(part.coded[0].data) and part.coded[0].setting == "first 40% of the file"
    assert part.coded[1:] == view.coded[1:] and part.data == view.data  # which is what can be saved


def test_refused_files_change_nothing(session, models, photo):
    *_, view = session.serve()
    good = models["nano-vq"].codec.compress(photo)
    foreign = Session({"nano": models["nano"]})
    with pytest.raises(ValueError, match=r"^cat.oscar: the file was written with model \w{4}, which is not here; here"):
        foreign.open(good, "cat.oscar", "nano", SIZE)
    for data, reason in (
        (good[:-1], "a.oscar: checksum does not match: the file is damaged or cut short"),
        (good[:5], "a.oscar: file ends in its header: it has 5 bytes"),
        (b"text", "a.oscar: not an .oscar file: it begins with 7465, not with 05c1"),
    ):
        with pytest.raises(ValueError) as error:
            session.open(data, "a.oscar", "nano-vq", SIZE)
        assert str(error.value) == reason
    assert session.upload.name == "cat.png" and session.preview(1) is view


def test_files_of_large_images_are_refused(session, models, monkeypatch, photo):
    data = models["nano-vq"].codec.compress(photo)
    monkeypatch.setattr(uploads, "MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"^a.oscar: has 192x176 pixels; allowed: 1,000 in all$"):
        session.open(data, "a.oscar", "nano-vq", SIZE)


# Several visitors


def test_visitors_have_sessions_of_their_own():
    sessions = Sessions({}, capacity=2)
    first = sessions.of("a")
    assert sessions.of("b") is not first and sessions.of("a") is first
    sessions.of("c")  # "b" was idle longest
    assert len(sessions) == 2 and sessions.of("a") is first
    sessions.end("a")
    sessions.end("a")
    assert len(sessions) == 1 and sessions.of("a") is not first
