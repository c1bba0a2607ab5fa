"""The tables of `oscar.benchmark.speed.inference`."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from oscar.utils.tables import Table

_TITLES = {
    "latency": {"size": "picture", "way": "networks", "encode_s": "encode s", "decode_s": "decode s",
                "both_s": "both s", "encode_speedup": "encode × plain", "decode_speedup": "decode × plain",
                "both_speedup": "both × plain", "max_difference": "largest difference",
                "exact_difference": "with exact norms", "psnr_db": "PSNR to plain dB",
                "other_indices_percent": "other indices %"},
    "memory": {"way": "way", "half": "half", "dtype": "precision", "load_s": "load s", "weights_mib": "weights MiB",
               "loaded_mib": "MiB when loaded", "load_peak_mib": "peak MiB of loading", "encode_s": "encode s",
               "decode_s": "decode s", "peak_mib": "peak MiB of the call", "cuda_peak_mib": "peak MiB on the GPU"},
    "large": {"half": "half", "size": "picture", "dtype": "precision", "weights_mib": "weights MiB",
              "loaded_mib": "MiB when loaded", "peak_mib": "peak MiB of the call", "beyond_mib": "MiB beyond loaded",
              "encode_s": "encode s", "decode_s": "decode s", "cuda_peak_mib": "peak MiB on the GPU"},
}  # fmt: skip
_DIGITS = {
    "_s": "{:.2f}",
    "_speedup": "{:.2f}",
    "_mib": "{:,.0f}",
    "_difference": "{:.1e}",
    "_db": "{:.1f}",
    "_percent": "{:.2f}",
}


def make_tables(frames: Mapping[str, pd.DataFrame], identity: Mapping) -> list[Table]:
    """The measurements as people read them.

    Args:
        frames: by name, those that there are of latency, memory and large.
        identity: `settings` of the measurements, `device` and `hardware`.
    """
    captions, made = _captions(identity), []
    for name, frame in frames.items():
        shown = {
            column: title for column, title in _TITLES[name].items() if column in frame and frame[column].notna().any()
        }
        formats = {
            column: digits.format for column in shown for ending, digits in _DIGITS.items() if column.endswith(ending)
        }
        if name == "latency":
            frame = frame.assign(way=frame["way"] + frame["default"].map({True: " (default)", False: ""}))
        made.append(Table(f"inference_{name}", captions[name], frame, shown, formats))
    return made


def _captions(identity: Mapping) -> dict[str, str]:
    settings, machine = identity["settings"], identity["hardware"]
    where = (
        machine["gpu"]
        if identity["device"].startswith("cuda")
        else (f"{machine['processor']}, {machine['threads']} threads")
    )
    model = settings["model"] or f"backbone {settings['backbone']['name']}, random weights"
    what = f"{model}; rate {settings['rate']:.4f}; {where}"
    return {
        "latency": f"Seconds from picture to file and back ({what}). plain: as published, in float32 with adapters "
        f"beside the weights. Medians of {settings['repeats']} rounds, in turns; ratios are medians over "
        "rounds. Differences are of decoded pictures, in [-1, 1], from plain as it is, and from plain with "
        "exact normalisations.",
        "memory": f"Loading, and one call with a picture of {settings['sizes'][0]}, each row in a process of its own "
        f"({what}). Resident memory includes Python and the libraries.",
        "large": f"Memory for one large picture, budget {settings['large_memory']}, each row in a process of its own "
        f"({what}).",
    }
