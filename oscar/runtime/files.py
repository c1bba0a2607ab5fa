"""What of a model's folder the runtime reads: description, graphs, and the tensors that are no network's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors import SafetensorError, safe_open

from oscar import model_folder
from oscar.model_folder import DATA, RUNTIME
from oscar.utils.errors import first_line
from oscar.utils.provenance import WEIGHTS

FORMAT = 1
Provider = str | tuple[str, dict[str, str]]  # of ONNX Runtime: a name, or one with options
# ONNX Runtime's names by device.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}


class RuntimeModelError(ValueError):
    """A model that the runtime cannot run, or a device that it does not have."""


class ModelFiles:
    """A model folder with graphs.

    Args:
        folder: of the model.
        checkpoint: contents of its oscar.json.
        providers: of ONNX Runtime, as `providers` gives them.
        threads: that networks compute with; None takes ONNX Runtime's choice.

    Attributes:
        description: contents of runtime.json.
        tensors: of oscar.safetensors but the denoiser's, floats in float32.

    Raises:
        CheckpointError: if a file is damaged.
        RuntimeModelError: if it has no graphs, or those of another model.
    """

    def __init__(self, folder: Path, checkpoint: dict, providers: Sequence[Provider], threads: int | None = None):
        self.folder, self.checkpoint, self.providers = folder, checkpoint, list(providers)
        self.options = onnxruntime.SessionOptions()
        self.options.log_severity_level = 3  # errors, which are raised too
        # Waiting threads must not take the cores from numpy's.
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            self.options.intra_op_num_threads = threads
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        self.description = self._describe()
        model_folder.check_hashes(folder, checkpoint["sha256"])
        graphs = [path.name for path in folder.iterdir() if path.suffix == ".onnx" or path.name == DATA]
        model_folder.check_hashes(folder, self.description["sha256"], RUNTIME, graphs)
        try:
            with safe_open(folder / WEIGHTS, "numpy") as file:
                names = [name for name in file.keys() if not name.startswith("denoiser.")]
                tensors = {name: file.get_tensor(name) for name in names}
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
        numbers = {name: description[name] for name in ("factor", "unet_multiple", "schedule_length")}
        for name, value in numbers.items():
            if type(value) is not int or value < 1:
                raise RuntimeModelError(f"{RUNTIME}: {name} is {value!r}; allowed: whole numbers from 1")
        for direction in ("encode", "decode"):
            if not isinstance(value := description["bytes_per_pixel"][direction], (int, float)):
                raise RuntimeModelError(f"{RUNTIME}: bytes_per_pixel.{direction} is {value!r}; allowed: numbers")
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


def providers(device: str) -> list[Provider]:
    """ONNX Runtime's providers for a device, the CPU's behind it for what it cannot do.

    Raises:
        RuntimeModelError: if the device is not there, listing those that are.
    """
    here, (kind, _, index) = onnxruntime.get_available_providers(), device.partition(":")
    if PROVIDERS.get(kind) not in here or index and not (kind == "cuda" and index.isdecimal()):
        allowed = ", ".join(name for name, provider in PROVIDERS.items() if provider in here)
        raise RuntimeModelError(f"device is {device!r}; allowed for the runtime here: {allowed}")
    own: Provider = (PROVIDERS[kind], {"device_id": index}) if index else PROVIDERS[kind]
    return [own] if kind == "cpu" else [own, PROVIDERS["cpu"]]
