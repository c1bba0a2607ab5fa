"""What a run measures between two rows of its log."""

from __future__ import annotations

from collections.abc import Mapping


class Interval:
    """Means over the passes since the last row, and the speed; part of checkpoints.

    A pass counts for the values that it gives: the loss of a rate is a mean over the passes that drew the rate.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.images, self.seconds = 0, 0.0

    def add(self, values: Mapping[str, float]) -> None:
        """Count a pass's values in, which are alike on every process."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def add_time(self, images: int, seconds: float) -> None:
        """Count a step's images, of all processes, and the seconds that it took."""
        self.images += images
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        """Each value's mean over the passes that gave it."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def state(self) -> dict:
        """What a resumed run needs to go on; seconds are apart, as all that is not alike in a repeated run."""
        return {"sums": dict(self.sums), "counts": dict(self.counts), "images": self.images}

    def restore(self, state: Mapping, seconds: float) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
        self.images, self.seconds = state["images"], seconds
