"""Weights of ONNX graphs in files beside them: those of a checkpoint where it holds them, else one file more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from oscar.model_folder import DATA

if TYPE_CHECKING:
    import onnx
    import onnx_ir

_INLINE = 64  # numbers up to which a tensor stays in its graph


class Place(NamedTuple):
    """Where a file holds a tensor."""

    file: str
    offset: int
    length: int
    narrow: bool  # float16


def stored_weights(folder: Path, names: Iterable[str]) -> dict[bytes, Place]:
    """Where a checkpoint's files hold which tensors, by the digest of their numbers in float32.

    Args:
        folder: of the model.
        names: files that belong to it; others may lie beside them, and are not sent along.
    """
    found = {}
    for path in sorted(name for name in names if name.endswith(".safetensors")):
        with (folder / path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for name, entry in header.items():
                if name == "__metadata__" or entry["dtype"] not in ("F16", "F32"):
                    continue
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                file.seek(begin)
                numbers = np.frombuffer(file.read(end - begin), np.float16 if entry["dtype"] == "F16" else np.float32)
                place = Place(path, begin, end - begin, entry["dtype"] == "F16")
                found[_digest(numbers.astype(np.float32).tobytes())] = place
    return found


def _digest(numbers: bytes) -> bytes:
    return hashlib.sha256(numbers).digest()


def point_to(model: onnx_ir.Model, stored: dict[bytes, Place], data: BinaryIO, narrow: bool) -> None:
    """Have a graph find its weights in files.

    Args:
        model: the graph, whose weights are replaced by where they are.
        stored: places that are known by now, to which those of new weights are added.
        data: where weights go that are in no file yet.
        narrow: whether they are written in float16.
    """
    from onnx_ir import DataType, ExternalTensor

    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor.dtype != DataType.FLOAT or tensor.size < _INLINE:
            continue
        numbers = tensor.numpy()
        key = _digest(numbers.tobytes())
        if key not in stored:
            content = numbers.astype(np.float16 if narrow else np.float32).tobytes()
            stored[key] = Place(DATA, data.tell(), len(content), narrow)
            data.write(content)
        place = stored[key]
        value.const_value = ExternalTensor(
            place.file,
            place.offset,
            place.length,
            DataType.FLOAT16 if place.narrow else DataType.FLOAT,
            shape=tensor.shape,
            name=name,
        )


def as_proto(model: onnx_ir.Model) -> onnx.ModelProto:
    """The file of a graph: without notes of where it came from, weights in float16 widened where they are used."""
    from onnx import TensorProto, helper
    from onnx_ir import to_proto

    proto, casts = to_proto(model), []
    proto.ClearField("metadata_props")
    del proto.graph.value_info[:]
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            name, tensor.name = tensor.name, f"{tensor.name}.float16"
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    for node in nodes:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto
