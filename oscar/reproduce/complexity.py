"""What a model costs: parameters, multiply-accumulates, latency by stage and memory, of encoder and decoder."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pandas as pd

from oscar.benchmark import tables
from oscar.reproduce.jobs import Job
from oscar.reproduce.rd import latency_table
from oscar.reproduce.study import Study, Summary

NAME = "model"


class Complexity(Study):
    """The timing part of a benchmark, on one image of each data set."""

    title = "Complexity"

    def jobs(self) -> list[Job]:
        return [
            Job(
                f"timing-on-{dataset}",
                "benchmark",
                (
                    "~models.nano",
                    f"+models.{NAME}={self.config.model}",
                    "baselines=[]",
                    "parts=[timing]",
                    "metrics.names=[psnr]",
                    f"data.images={self.images_of(dataset)}",
                    "data.limit=1",
                    f"timing.repeats={self.config.repeats}",
                ),
                (),
                (self.config.model,),
            )
            for dataset in self.config.data.datasets
        ]

    def summarise(self, done: Sequence[str]) -> Summary:
        summary, ours = Summary(), []
        for dataset in self.config.data.datasets:
            if f"timing-on-{dataset}" not in done:
                continue
            folder = self.output / "runs" / f"timing-on-{dataset}" / "timing"
            names = ("latency", "stages", "throughput", "memory", "macs", "parameters")
            read = {name: pd.read_csv(folder / f"{name}.csv") for name in names}
            frame = tables.timing_frame(*(read[name] for name in names[:-1]))
            first = read["latency"].iloc[0]
            size = f"{first['width']}x{first['height']}"
            timing = tables.timing_table(frame, f"{size} pixels", int(first["repeats"]))
            summary.tables += [_named(timing, dataset), _named(tables.parameter_table(read["parameters"]), dataset)]
            hardware = json.loads((folder / "run.json").read_text())["hardware"]
            machine = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} threads"
            calls = frame[frame["stage"] == "whole call"]
            ours.append(
                pd.DataFrame(
                    {
                        "label": f"OSCAR ({self.config.model})",
                        "protocol": "bitstream",
                        "task": calls["direction"],
                        "resolution": size,
                        "hardware": machine,
                        "ms": calls["p50_ms"],
                        "source": f"measured here, {dataset}",
                    }
                )
            )
        if ours:
            summary.tables.append(latency_table(pd.concat(ours, ignore_index=True)))
        return summary


def _named(table: tables.Table, dataset: str) -> tables.Table:
    return tables.Table(f"{table.name}_{dataset}", table.caption, table.frame, table.shown, table.formats, table.notes)
