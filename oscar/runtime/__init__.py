"""Coding without torch: numpy, Pillow, ONNX Runtime and the bitstream, for models that `oscar export` wrote.

from oscar.runtime import Codec
codec = Codec("nano")
data = codec.compress(image, max_bytes=4000)
image = codec.decompress(data)
"""

from oscar.runtime.codec import Codec
from oscar.runtime.files import RuntimeModelError

__all__ = ["Codec", "RuntimeModelError"]
