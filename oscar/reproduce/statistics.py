"""How sure a difference between two ways of training is: over images, over seeds, and over many comparisons.

Images are drawn again in pairs, both ways on the same ones, since images differ far more than codecs do. Seeds are few,
so that they get no interval: their spread is stated, and a difference counts only if all of them have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from oscar.evaluation.curves import image_deltas

ALPHA = 0.05
LEVEL = 1 - ALPHA
RESAMPLES = 9999


class Interval(NamedTuple):
    """A mean, and the range in which it lies at `LEVEL`; NaN where there is none."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float]) -> Interval:
    """The mean of one value per image, with a percentile interval over images drawn again; the same each time.

    Args:
        values: without NaN; of fewer than two there is no interval.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return Interval(float(values.mean()) if len(values) else np.nan, np.nan, np.nan)
    if np.ptp(values) == 0:
        return Interval(*[float(values[0])] * 3)
    result = bootstrap(
        (values,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return Interval(float(values.mean()), *map(float, result.confidence_interval))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of a mean difference of zero: signs of the images' differences are flipped at random, or all ways.

    Args:
        differences: one per image, without NaN; NaN of fewer than two.
    """
    from scipy.stats import permutation_test

    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return np.nan
    result = permutation_test(
        (values, np.zeros_like(values)),
        lambda one, other, axis: np.mean(one - other, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p of each comparison so that, over all, a false find has at most the stated chance.

    Args:
        p_values: NaN are left as they are, and do not count.
    """
    values = np.array(p_values, dtype=float)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    raised = values[order] * np.arange(len(order), 0, -1)
    values[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return values.tolist()


def compare(rows: pd.DataFrame, metric: str, reference: str, variants: Sequence[str]) -> pd.DataFrame:
    """Each variant beside the reference, rate by rate and over all rates that both have.

    Args:
        rows: variant, seed, image, rate and the metric.
        metric: column.
        reference: the variant that the others are compared to.
        variants: in the order of the result.

    Returns:
        A row per rate (NaN: mean over rates) and variant: rate, variant, seeds, images, value (mean over images and
        seeds), seed_sd (standard deviation over seeds of the mean over images, NaN of one seed), and but for the
        reference difference (variant minus reference, on the images, rates and seeds that both have), low, high (its
        interval over images), p, p_holm (corrected over the variants and rates of this frame, and apart over those of
        the mean), seeds_agree (whether it has one sign at every seed, NaN of one seed).
    """
    rows = rows.dropna(subset=[metric])
    result = []
    for rate in [np.nan, *sorted(rows["rate"].unique())]:
        of_rate = rows if np.isnan(rate) else rows[rows["rate"] == rate]
        for variant in variants:
            own = of_rate[of_rate["variant"] == variant]
            if not len(own):
                continue
            other = of_rate[of_rate["variant"] == reference]
            common = sorted(set(own["rate"]) & set(other["rate"]))
            if variant != reference and not common:
                continue
            table = _by_seed(own, metric)
            entry = {
                "rate": rate,
                "variant": variant,
                "seeds": table.shape[1],
                "images": table.shape[0],
                "value": float(table.mean().mean()),
                "seed_sd": float(table.mean().std(ddof=1)),
            }
            if variant != reference:
                entry |= _difference(*(_by_seed(part[part["rate"].isin(common)], metric) for part in (own, other)))
            result.append(entry)
    frame = pd.DataFrame(result)
    if "p" in frame:
        means = frame["rate"].isna()
        for part in (means, ~means):
            frame.loc[part, "p_holm"] = holm(frame.loc[part, "p"])
    return frame


def compare_bytes(
    rows: pd.DataFrame, metric: str, higher_is_better: bool, reference: str, variants: Sequence[str]
) -> pd.DataFrame:
    """BD-rate of each variant against the reference of the same seed, image by image.

    Args:
        rows: variant, seed, and what `oscar.evaluation.evaluate` gives.
        metric: column.
        higher_is_better: the direction of the metric.
        reference: the variant that the others are compared to.
        variants: in the order of the result.

    Returns:
        A row per variant, and one per further seed of the reference against its first, which has no p: variant, seeds,
        and but for the reference itself difference (BD-rate in %, mean over images and seeds), low, high, p, p_holm and
        seeds_agree as of `compare`, seed_sd (standard deviation over seeds of the mean over images), overlap_percent
        (mean of `BDDelta`), images (those with a common range of quality at every seed, over which all this is) and
        of_images (all).
    """
    runs = dict(list(rows.dropna(subset=[metric]).groupby(["variant", "seed"])))
    seeds = sorted({seed for _, seed in runs})
    result = []
    for variant in variants:
        own = [seed for seed in seeds if (variant, seed) in runs]
        pairs = {seed: (runs[reference, seed], runs[variant, seed]) for seed in own if (reference, seed) in runs}
        if variant == reference or not pairs:
            result += [{"variant": variant, "seeds": len(own)}] if own else []
        else:
            result.append({"variant": variant, "seeds": len(pairs), **_bd_rates(pairs, metric, higher_is_better)})
    first, *others = [seed for seed in seeds if (reference, seed) in runs] or [None]
    for seed in others:
        found = _bd_rates({seed: (runs[reference, first], runs[reference, seed])}, metric, higher_is_better)
        name = f"{reference}, seed {seed} against {first}"
        result.append({"variant": name, "seeds": 1, **found, "p": np.nan})
    frame = pd.DataFrame(result)
    return frame.assign(p_holm=holm(frame["p"])) if "p" in frame else frame


def _bd_rates(pairs: Mapping[int, tuple[pd.DataFrame, pd.DataFrame]], metric: str, higher_is_better: bool) -> dict:
    """Of rows of an anchor and a test by seed."""
    deltas = {seed: image_deltas(*pair, metric, higher_is_better) for seed, pair in pairs.items()}
    rates, overlaps = (
        pd.DataFrame({seed: {image: getattr(delta, name) for image, delta in found.items()}
                      for seed, found in deltas.items()}, dtype=float)
        for name in ("bd_rate_percent", "overlap_percent")
    )  # fmt: skip
    kept = rates.dropna()
    return {
        "seed_sd": float(kept.mean().std(ddof=1)),
        "overlap_percent": float(overlaps.loc[kept.index].mean().mean()),
        "images": len(kept),
        "of_images": len(rates),
        **_difference(kept, 0 * kept),
    }


def _by_seed(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Means over rates: images down, seeds across; images that lack a rate or a seed are left out."""
    table = rows.pivot_table(index="image", columns=["seed", "rate"], values=metric)
    return table.dropna().T.groupby(level="seed").mean().T


def _difference(own: pd.DataFrame, other: pd.DataFrame) -> dict:
    seeds, images = own.columns.intersection(other.columns), own.index.intersection(other.index)
    paired = len(seeds) > 0  # seeds that both have meet the same crops in the same order
    if paired:
        own, other = own[seeds], other[seeds]
    per_image = own.loc[images].mean(axis=1) - other.loc[images].mean(axis=1)
    interval = bootstrap_mean(per_image)
    per_seed = own.loc[images].mean() - (other.loc[images].mean() if paired else other.loc[images].mean().mean())
    agree = np.nan if len(per_seed) < 2 else bool((np.sign(per_seed) == np.sign(per_seed.iloc[0])).all())
    return {
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "p": sign_flip_p(per_image),
        "seeds_agree": agree,
    }
