"""A benchmark: several codecs on one data set, from images to tables, plots and a report page.

    OUTPUT/report.html          the report page
    OUTPUT/tables/              means, matched bytes, BD-rate and timing, each as CSV, Markdown and LaTeX
    OUTPUT/plots/               rate-distortion plots as PDF, SVG and PNG
    OUTPUT/benchmark.json       where it comes from: configuration, codecs, what was left out, commit, hardware
    OUTPUT/codecs/<codec>/      results of `oscar.evaluation.evaluate`
    OUTPUT/matched/             baselines at the sizes of OSCAR's files (`oscar.benchmark.matched`), results.csv: all
    OUTPUT/timing/              the tables of `oscar.benchmark.speed.timing`
    OUTPUT/training/            figures of `oscar.benchmark.speed.training`
    OUTPUT/inference/           figures of `oscar.benchmark.speed.inference`
    OUTPUT/images/            decoded images of the report page

What is done is kept: the same command goes on where it stopped. Tables, plots and page are made from what there is.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from oscar.baselines.base import ImageCodec
from oscar.benchmark import tables
from oscar.benchmark.matched import match_bytes
from oscar.benchmark.plots import plot_rates
from oscar.benchmark.setup import Benchmark, prepare, protocol_of
from oscar.data.images import ImageError, read_image
from oscar.evaluation.curves import published_curves
from oscar.evaluation.evaluate import check_results, evaluate
from oscar.evaluation.results import EvaluationError, load_results, missing_notes
from oscar.metrics.image import METRICS, metrics_of
from oscar.metrics.protocol import PROTOCOLS
from oscar.utils import former
from oscar.utils.environment import describe_environment, hardware
from oscar.utils.errors import first_line
from oscar.utils.files import atomic_write
from oscar.utils.strict_json import as_read, write_json
from oscar.utils.tables import Table

if TYPE_CHECKING:
    from oscar.config import BenchmarkConfig


def run_benchmark(config: BenchmarkConfig) -> Benchmark | None:
    """Run the parts of a configuration, with progress, and write tables, plots and page.

    A baseline or metric that does not exist or cannot be had costs a line and is listed as unavailable.

    Returns:
        What was found; None if no part was asked for that looks at codecs and images.

    Raises:
        ValueError: for an unknown model, rate or device, a folder without images, or if no codec is left.
    """
    _set_up(config)
    for part, run_speed in SPEED_PARTS.items():
        if part in config.parts:
            for table in run_speed(config):
                table.write(Path(config.output) / "tables")
                _say(f"{part}: {Path(config.output) / 'tables' / table.name}.md")
    if config.parts and SPEED_PARTS.keys() >= set(config.parts):
        return None
    bench = prepare(config)
    for part, run in (("quality", run_quality), ("matched", run_matched), ("timing", run_timing_part)):
        run(bench, part in config.parts)
    write_results(bench)
    if "report" in config.parts:
        from oscar.benchmark.report.page import write_report
        from oscar.benchmark.results import report_data

        _say("report: decoding its images")
        write_report(bench.output / "report.html", report_data(bench))
    for what in ("tables", "plots", *(["report.html"] if "report" in config.parts else [])):
        _say(f"{'report page' if what == 'report.html' else what}: {bench.output / what}")
    return bench


def _set_up(config: BenchmarkConfig) -> None:
    import torch

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise EvaluationError("the benchmark runs in one process; oscar evaluate runs in several")
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def _training_part(config: BenchmarkConfig) -> list[Table]:
    from oscar.benchmark.speed.training import run_training_speed

    return run_training_speed(config.training, Path(config.output), config.device)


def _inference_part(config: BenchmarkConfig) -> list[Table]:
    from oscar.benchmark.speed.inference import run_inference_speed

    return run_inference_speed(config.inference, Path(config.output), config.device)


# Parts that look at neither codecs nor images; each gives its tables.
SPEED_PARTS = {"training": _training_part, "inference": _inference_part}


# Parts. Each fills in its share of the benchmark: by running, or from what an earlier run left.


def run_quality(bench: Benchmark, is_asked: bool) -> None:
    """Every codec at its points on all images: `rows` and `set_scores`."""
    frames, sets = [], []
    for number, codec in enumerate(bench.codecs, 1):
        folder = bench.output / "codecs" / codec.name
        try:
            metrics = bench.metrics.only(metrics_of(protocol_of(codec), bench.config.metrics.names))
            if is_asked:
                _say(f"quality {number}/{len(bench.codecs)}: {codec.label}")
                config = asdict(bench.config)
                evaluate(codec, list(bench.images.values()), metrics, folder, root=bench.root, config=config)
            elif not (folder / "results.json").exists():
                continue
            else:  # they may be of another model, or other images
                check_results(codec, list(bench.images.values()), metrics, folder, bench.root)
            frame, record = load_results(folder)
        except EvaluationError as error:
            bench.unavailable[codec.name] = str(error)
            print(f"{codec.label} is left out: {error}", file=sys.stderr)
            continue
        frames.append(frame[frame["point"].isin(codec.points)].assign(label=codec.label))
        sets += [{"codec": codec.name, **scores} for scores in record["set_metrics"]]
        bench.failed |= {f"{codec.name}: {row['image']}": row["error"] for row in record["failed"]}
    if frames:
        bench.rows = pd.concat(frames, ignore_index=True)
    elif is_asked:
        raise EvaluationError(f"no codec could be scored: {bench.unavailable[bench.codecs[0].name]}")
    if sets:
        bench.set_scores = pd.DataFrame(sets).drop(columns="images")


def run_matched(bench: Benchmark, is_asked: bool) -> None:
    """Every baseline at the sizes of OSCAR's files: `matched`."""
    results = bench.output / "matched/results.csv"
    if not is_asked and not results.exists():
        return
    targets = bench.rows
    if len(targets):
        targets = targets[targets["codec"].isin(codec.name for codec in bench.ours) & targets["file_bytes"].notna()]
    if not len(targets) or not bench.baselines:
        if is_asked:
            _say("matched: nothing to do without files of OSCAR and without baselines")
        return
    frames = []
    for number, codec in enumerate(bench.baselines, 1):
        if is_asked:
            _say(f"matched {number}/{len(bench.baselines)}: {codec.label} at the sizes of OSCAR's files")
        frame, failed = match_bytes(
            codec, targets, bench.images, bench.metrics, bench.output / "matched", progress=is_asked, make=is_asked
        )
        bench.failed |= {f"{codec.name} at matched bytes: {name}": reason for name, reason in failed.items()}
        frames.append(frame)
    bench.matched = pd.concat(frames, ignore_index=True)
    if len(bench.matched) and is_asked:
        atomic_write(results, bench.matched.to_csv(index=False).encode())


def run_timing_part(bench: Benchmark, is_asked: bool) -> None:
    """Speed, memory and size of the codecs on one image: `timing`. Not measured twice on one machine."""
    from oscar.benchmark.speed.timing import TimingResult, run_timing

    folder = bench.output / "timing"
    tabular = [item.name for item in fields(TimingResult) if item.name != "hardware"]
    path = folder / "run.json"
    record = former.with_new_keys(json.loads(path.read_text())) if path.exists() else None
    settings = bench.config.timing
    codecs = [codec for codec in bench.codecs if protocol_of(codec) == "bitstream"]
    points = {codec.name: settings.points.get(codec.name, [_middle(codec.points)]) for codec in codecs}
    if record is not None and not is_asked and not _is_timing_of(record, codecs, bench.images):
        print("timing is left out: it is of other codecs or images; allowed: timing in parts", file=sys.stderr)
        record = None
    if is_asked and codecs:
        name = bench.rows["image"].iloc[0] if len(bench.rows) else next(iter(bench.images))  # one that can be read
        identity = {
            "codecs": [codec.describe() for codec in codecs],
            "points": points,
            "image": [name, hashlib.sha256(bench.images[name].read_bytes()).hexdigest()],
            "settings": asdict(settings),
            "hardware": hardware(),
        }
        identity = as_read(identity)
        if record != identity:
            _say(f"timing on {name}, {settings.repeats} rounds")
            try:
                result = run_timing(
                    codecs,
                    read_image(bench.images[name]),
                    points,
                    settings.repeats,
                    settings.warmup,
                    settings.batch_sizes,
                    settings.memory,
                )
            except (RuntimeError, OSError, ImageError) as error:
                bench.failed["timing"] = first_line(error)
                print(f"timing is left out: {bench.failed['timing']}", file=sys.stderr)
                return
            folder.mkdir(parents=True, exist_ok=True)
            for table in tabular:
                atomic_write(folder / f"{table}.csv", getattr(result, table).to_csv(index=False).encode())
            write_json(path, identity)
            record = identity
    if record is not None:
        read = {table: pd.read_csv(folder / f"{table}.csv").rename(columns=former.KEYS) for table in tabular}
        bench.timing = TimingResult(**read, hardware=record["hardware"])


def _is_timing_of(record: dict, codecs: Sequence[ImageCodec], images: Mapping[str, Path]) -> bool:
    """Whether a record of timings is of these codecs, or some of them, and of one of these images."""
    known = {codec.name: as_read(codec.describe()) for codec in codecs}
    name, digest = record["image"]
    return all(known.get(codec["name"]) == codec for codec in record["codecs"]) and (
        name in images and hashlib.sha256(images[name].read_bytes()).hexdigest() == digest
    )


def _middle(points: Sequence[float]) -> float:
    return points[len(points) // 2]


# Results.


def write_results(bench: Benchmark) -> None:
    """Write tables, plots and benchmark.json from what the parts have found."""
    folder = bench.output / "tables"
    for table in make_tables(bench):
        table.write(folder)
    if len(bench.rows):
        for protocol in bench.protocols:
            rows = bench.rows[bench.rows["protocol"] == protocol].dropna(axis="columns", how="all")
            atomic_write(folder / f"{tables.named('rows', protocol)}.csv", rows.to_csv(index=False).encode())
        paper_hint = {} if "paper" in bench.protocols else dict.fromkeys(METRICS, "protocols=[bitstream,paper] does")
        for protocol in PROTOCOLS:  # the paper's own curves are drawn in any case
            plot_rates(
                bench.output / "plots",
                bench.means[bench.means["protocol"] == protocol],
                published_curves(bench.dataset, protocol),
                f"Means over {bench.title}",
                bench.unavailable | (paper_hint if protocol == "paper" else {}),
                protocol,
            )
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": asdict(bench.config),
        "images": list(bench.images),
        "dataset": bench.dataset,
        "codecs": {codec.name: codec.describe() for codec in bench.codecs},
        "unavailable": bench.unavailable,
        "failed": bench.failed,
        **describe_environment(),
    }
    bench.output.mkdir(parents=True, exist_ok=True)
    write_json(bench.output / "benchmark.json", record)


def make_tables(bench: Benchmark) -> list[Table]:
    """All tables for which there are results."""
    made, names = [], bench.metrics.names
    if len(bench.rows):
        for protocol in bench.protocols:
            asked = metrics_of(protocol, bench.config.metrics.names)
            rows = bench.rows[bench.rows["protocol"] == protocol]
            notes = [
                note
                for codec, group in rows.groupby("label", sort=False)
                for note in missing_notes(group, asked, f"{codec}, ")
            ]
            made.append(tables.means_table(bench.means, names, bench.unavailable, protocol, notes))
            made.append(tables.bd_frame_table(bench.bd, bench.config.bd_method, protocol))
    if len(bench.matched) and len(bench.rows):
        made += tables.matched_tables(bench.matched_means, bench.rows, names)
    if bench.timing is not None:
        made.append(bench.timing_table)
        made.append(tables.parameter_table(bench.timing.parameters))
    return made


def _say(line: str) -> None:
    print(line, flush=True)
