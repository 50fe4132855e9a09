"""How good a predictor is, how sure that is, and what changed sample by sample."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from slimdown.core import Accuracy, Score
from slimdown.errors import BadInput

Z95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""

Outcomes = npt.NDArray[np.float64]


class Interval(NamedTuple):
    low: float
    high: float

    def clipped(self, low: float, high: float) -> Interval:
        return Interval(max(low, self.low), min(high, self.high))

    def in_points(self) -> Interval:
        return Interval(100.0 * self.low, 100.0 * self.high)


def measure_accuracy(
    score: Score, *, baseline: Score | None = None, reference: Score | None = None
) -> Accuracy:
    """Add to `score` its 95 % interval and how it compares with `baseline` and `reference`.

    `baseline` is the user's own model judged on the same samples, `reference` the torch module
    that was deployed. Intervals need the outcomes of the scores, agreement the predictions of
    both; without them they are None. Raises BadInput where two scores cannot be
    compared: another metric, or another number of samples.
    """
    low = high = None
    if (own := _score_interval(score)) is not None:
        low, high = own.in_points()
    change = change_low = change_high = None
    if baseline is not None:
        _check_comparable(score, baseline)
        change = score.value - baseline.value
        if (interval := _change_interval(score, baseline)) is not None:
            change_low, change_high = interval.in_points()
    return Accuracy(
        metric=score.metric,
        value=score.value,
        low=low,
        high=high,
        num_samples=score.num_samples,
        change=change,
        change_low=change_low,
        change_high=change_high,
        agreement=None if reference is None else _agreement(score, reference),
    )


def wilson_interval(successes: float, num_samples: int) -> Interval:
    """The 95 % interval of a proportion. Wilson 1927, doi:10.1080/01621459.1927.10502953.

    `successes` may be fractional: among all means of `num_samples` values in [0, 1], that of
    0/1 values varies most, so the interval then errs on the wide side.
    """
    n, p = num_samples, successes / num_samples
    scale = 1 + Z95**2 / n
    center = (p + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return Interval(center - half, center + half).clipped(0.0, 1.0)


def mean_interval(values: Outcomes) -> Interval:
    """The 95 % interval of a mean by the central limit theorem; needs two values or more."""
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Interval(float(values.mean()) - half, float(values.mean()) + half)


def paired_proportion_interval(gained: int, lost: int, num_samples: int) -> Interval:
    """The 95 % interval of a difference of two proportions on the same samples.

    `gained` samples went from 0 to 1 and `lost` from 1 to 0; the others cancel out. One is added
    to each of the two counts, which keeps the coverage near 95 % also where they are few or none.
    Bonett & Price 2012, doi:10.3102/1076998611411915; recommended by Fagerland 2014,
    doi:10.1002/sim.6148.
    """
    n = num_samples + 2
    up, down = (gained + 1) / n, (lost + 1) / n
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / n)
    return Interval(up - down - half, up - down + half).clipped(-1.0, 1.0)


def _score_interval(score: Score) -> Interval | None:
    outcomes = _averaged_outcomes(score)
    if outcomes is None:
        return None
    if _is_binary(outcomes) or outcomes.size < 2:
        return wilson_interval(score.value / 100 * score.num_samples, score.num_samples)
    return mean_interval(outcomes).clipped(0.0, 1.0)


def _change_interval(score: Score, baseline: Score) -> Interval | None:
    after, before = _averaged_outcomes(score), _averaged_outcomes(baseline)
    if after is None or before is None:
        return None
    if _is_binary(after) and _is_binary(before):
        gained = int(np.count_nonzero(after > before))
        lost = int(np.count_nonzero(after < before))
        return paired_proportion_interval(gained, lost, after.size)
    return mean_interval(after - before).clipped(-1.0, 1.0) if after.size > 1 else None


def _agreement(score: Score, reference: Score) -> float | None:
    _check_comparable(score, reference)
    if score.predictions is None or reference.predictions is None:
        return None
    if score.predictions.shape != reference.predictions.shape:
        raise BadInput(
            f"predictions of shapes {score.predictions.shape} and {reference.predictions.shape} "
            "cannot be compared: task.score must give one prediction a sample"
        )
    return 100.0 * float(np.mean(score.predictions == reference.predictions))


def _averaged_outcomes(score: Score) -> Outcomes | None:
    """The outcomes, if the score's value is their mean: intervals hold for means only."""
    if score.outcomes is None:
        return None
    outcomes = np.asarray(score.outcomes, dtype=np.float64)
    is_mean = math.isclose(100.0 * float(outcomes.mean()), score.value, abs_tol=1e-6)
    return outcomes if is_mean else None


def _is_binary(outcomes: Outcomes) -> bool:
    return bool(np.all((outcomes == 0) | (outcomes == 1)))


def _check_comparable(score: Score, other: Score) -> None:
    if (score.metric, score.num_samples) != (other.metric, other.num_samples):
        raise BadInput(
            f"{score.metric} of {score.num_samples} samples cannot be compared with "
            f"{other.metric} of {other.num_samples}: task.score must judge every model by the same "
            "metric on the same samples"
        )
