"""What of a model's folder the runtime reads: description, graphs, and the tensors that are no network's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors import SafetensorError
from safetensors.numpy import load_file

from oscar import model_folder
from oscar.model_folder import RUNTIME
from oscar.utils.errors import first_line
from oscar.utils.provenance import WEIGHTS

FORMAT = 1
# ONNX Runtime's names by device.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}


class RuntimeModelError(ValueError):
    """A model that the runtime cannot run, or a device that it does not have."""


def has_graphs(source: str | Path) -> bool:
    """Whether a model is here, and has graphs."""
    try:
        return (model_folder.locate(source) / RUNTIME).is_file()
    except model_folder.CheckpointError:
        return False


class ModelFiles:
    """A model folder with graphs.

    Args:
        source: name of a shipped model, a folder, or a hub id.
        device: cpu, cuda, coreml or directml.
        threads: that networks compute with; None takes ONNX Runtime's choice.

    Attributes:
        checkpoint: contents of oscar.json.
        description: contents of runtime.json.
        tensors: of oscar.safetensors, floats in float32.

    Raises:
        CheckpointError: if it is no model's folder, or a file is damaged.
        RuntimeModelError: if it has no graphs or those of another model, or the device is not there.
    """

    def __init__(self, source: str | Path, device: str = "cpu", threads: int | None = None):
        self.options = onnxruntime.SessionOptions()
        self.options.log_severity_level = 3  # errors, which are raised too
        # Waiting threads must not take the cores from numpy's.
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            self.options.intra_op_num_threads = threads
        self.providers = _providers(device)
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        with model_folder.reading(source, RuntimeModelError) as (self.folder, self.checkpoint):
            self.description = self._describe()
            model_folder.check_hashes(self.folder, self.checkpoint["sha256"])
            model_folder.check_hashes(self.folder, self.description["sha256"], RUNTIME)
            try:
                tensors = load_file(self.folder / WEIGHTS)
            except SafetensorError as error:
                raise RuntimeModelError(f"{WEIGHTS} cannot be read: {first_line(error)}") from None
        self.tensors = {
            name: value.astype(np.float32) if value.dtype.kind == "f" else value for name, value in tensors.items()
        }

    def _describe(self) -> dict[str, Any]:
        if not (self.folder / RUNTIME).is_file():
            raise RuntimeModelError(f"it has no {RUNTIME}; allowed: a model folder that `oscar export` wrote")
        description = json.loads((self.folder / RUNTIME).read_text())
        if description["format"] != FORMAT:
            raise RuntimeModelError(f"{RUNTIME}: format is {description['format']!r}; allowed: {FORMAT}")
        if description["fingerprint"] != model_folder.identity(self.checkpoint):
            raise RuntimeModelError(f"{RUNTIME} is of another model; allowed: that of `oscar export` of this one")
        return description

    def array(self, name: str) -> np.ndarray:
        """A tensor of the bottleneck's."""
        return self.tensors[f"bottleneck.{name}"]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Tensors whose names begin with `prefix` and a dot, by the rest of their names."""
        start = f"{prefix}."
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}

    def run(self, graph: str, **inputs: np.ndarray) -> np.ndarray:
        """The output of a graph, float32.

        Raises:
            RuntimeModelError: if it cannot be run, or gives numbers that are not finite.
            MemoryError: if there is too little memory for it.
        """
        try:
            if graph not in self.sessions:
                path = str(self.folder / f"{graph}.onnx")
                self.sessions[graph] = onnxruntime.InferenceSession(path, self.options, self.providers)
            (result,) = self.sessions[graph].run(None, inputs)
        except Exception as error:  # of ONNX Runtime, whose classes have no base of their own
            if "allocat" in str(error):
                raise MemoryError(f"{graph}: out of memory") from None
            raise RuntimeModelError(f"{graph} of {self.folder.name} cannot be run: {first_line(error)}") from None
        if not np.isfinite(result).all():
            raise RuntimeModelError(f"{graph} of {self.folder.name} gave numbers that are not finite")
        return result


def _providers(device: str) -> list[str]:
    here = onnxruntime.get_available_providers()
    if PROVIDERS.get(device) not in here:
        allowed = ", ".join(name for name, provider in PROVIDERS.items() if provider in here)
        raise RuntimeModelError(f"device is {device!r}; allowed for the runtime here: {allowed}")
    return list(dict.fromkeys((PROVIDERS[device], PROVIDERS["cpu"])))
