import pytest
from PIL import Image

from oscar.baselines import Encoded, ImageCodec


class FakeCodec(ImageCodec):
    """Files of given sizes, by point; counts what is encoded."""

    name, label, point_name = "fake", "Fake", "quality"

    def __init__(self, sizes):
        self.sizes = sizes
        self.points = self.grid = tuple(range(len(sizes)))
        self.encoded = []

    def encode(self, image, point):
        self.encoded.append(point)
        return Encoded(bytes(self.sizes[point]))

    def decode(self, data):
        return Image.new("RGB", (4, 3))


@pytest.fixture
def fake_codec():
    return FakeCodec
