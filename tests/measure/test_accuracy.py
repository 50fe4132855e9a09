"""Intervals against published figures, against scipy, and by the share of truths they cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from slimdown.core import Score
from slimdown.errors import BadInput
from slimdown.measure import measure_accuracy
from slimdown.measure.accuracy import paired_proportion_interval, wilson_interval


def score_of(outcomes: np.ndarray, predictions: np.ndarray | None = None) -> Score:
    chosen = None if predictions is None else torch.from_numpy(predictions)
    return Score.from_outcomes("top1", torch.from_numpy(outcomes), predictions=chosen)


@given(st.integers(1, 3000), st.floats(0, 1))
def test_wilson_agrees_with_scipy(num_samples: int, share: float) -> None:
    successes = round(share * num_samples)
    low, high = wilson_interval(successes, num_samples)
    expected = stats.binomtest(successes, num_samples).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("gained", "lost", "num_samples", "low", "high"),
    [
        (26, 4, 48, 0.2548067, 0.6251933),  # the example of R's statpsych::ci.prop.ps
        (6, 16, 161, -0.1195, -0.0032),  # Cavo 2012, by R's contingencytables
    ],
)
def test_paired_interval_agrees_with_published_figures(
    gained: int, lost: int, num_samples: int, low: float, high: float
) -> None:
    interval = paired_proportion_interval(gained, lost, num_samples)
    assert interval == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("truth", [0.5, 0.9, 0.99])
def test_wilson_covers_95_percent(truth: float) -> None:
    """Exactly: summed over every outcome of 1,000 samples."""
    counts = np.arange(1001)
    intervals = [wilson_interval(count, 1000) for count in counts]
    covers = [low <= truth <= high for low, high in intervals]
    coverage = stats.binom.pmf(counts, 1000, truth)[covers].sum()
    assert 0.93 < coverage < 0.975


@pytest.mark.parametrize(("gain", "loss"), [(0.02, 0.03), (0.005, 0.02), (0.1, 0.1), (0.0, 0.01)])
def test_paired_interval_covers_95_percent(gain: float, loss: float) -> None:
    """Counts of 1,000 samples drawn 4,000 times around a known change."""
    draws = np.random.default_rng(0).multinomial(1000, [gain, loss, 1 - gain - loss], size=4000)
    intervals = np.array([paired_proportion_interval(up, down, 1000) for up, down, _ in draws])
    covered = (intervals[:, 0] <= gain - loss) & (gain - loss <= intervals[:, 1])
    assert 0.93 < covered.mean() < 0.98


def test_fractional_outcomes_cover_95_percent() -> None:
    """Outcomes of known mean 74 and a known change of 1 point: both intervals."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1500):
        after = 0.1 + 0.8 * rng.beta(8, 2, size=200)
        before = after + rng.uniform(-0.05, 0.03, size=200)
        found = measure_accuracy(score_of(after), baseline=score_of(before))
        assert found.change_low is not None
        assert found.change_high is not None
        in_change = found.change_low <= 1.0 <= found.change_high
        covered.append((found.low <= 74.0 <= found.high, in_change))
    assert np.mean(covered, axis=0) == pytest.approx([0.95, 0.95], abs=0.02)


def test_change_is_told_in_points_on_the_same_samples() -> None:
    before = np.array([1, 1, 1, 0, 0, 1, 1, 1, 1, 1.0])
    after = np.array([1, 1, 0, 1, 0, 1, 1, 0, 0, 1.0])  # one gained, three lost
    found = measure_accuracy(score_of(after), baseline=score_of(before))
    assert found.value == pytest.approx(60.0)
    assert found.change == pytest.approx(-20.0)
    expected = paired_proportion_interval(1, 3, 10)
    assert (found.change_low, found.change_high) == pytest.approx(
        (100 * expected.low, 100 * expected.high)
    )


def test_pairing_is_narrower_than_two_separate_intervals() -> None:
    rng = np.random.default_rng(0)
    before = (rng.random(1000) < 0.9).astype(float)
    after = np.where(rng.random(1000) < 0.02, 1 - before, before)
    found = measure_accuracy(score_of(after), baseline=score_of(before))
    assert found.change_low is not None
    assert found.change_high is not None
    assert found.change_high - found.change_low < 0.6 * (found.high - found.low)


def test_the_model_itself_has_changed_by_nothing() -> None:
    score = score_of(np.array([1.0, 0.0, 1.0, 1.0] * 250))
    found = measure_accuracy(score, baseline=score)
    assert found.change == 0.0
    assert found.change_low == pytest.approx(-0.28, abs=0.005)
    assert found.change_high == pytest.approx(0.28, abs=0.005)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_intervals_hold_their_value_and_stay_within_points(
    pairs: list[tuple[float, float]],
) -> None:
    before, after = (np.array(values) for values in zip(*pairs, strict=True))
    found = measure_accuracy(score_of(after), baseline=score_of(before))
    assert -1e-9 <= found.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.high <= 100 + 1e-9
    if found.change_low is not None:
        assert found.change is not None
        assert found.change_high is not None
        assert found.change_low - 1e-9 <= found.change <= found.change_high + 1e-9


def test_agreement_counts_equal_predictions() -> None:
    outcomes = np.array([1.0, 0.0, 1.0, 1.0])
    torch_module = score_of(outcomes, np.array([3, 1, 2, 0]))
    deployed = score_of(outcomes, np.array([3, 2, 2, 0]))
    assert measure_accuracy(deployed, reference=torch_module).agreement == 75.0


def test_without_outcomes_only_the_change_itself_is_known() -> None:
    before = Score(metric="mAP", value=50.0, num_samples=500)
    after = Score(metric="mAP", value=48.5, num_samples=500)
    found = measure_accuracy(after, baseline=before, reference=before)
    assert found.change == -1.5
    assert (found.change_low, found.change_high, found.agreement) == (None, None, None)
    assert (found.low, found.high) == (None, None)


def test_outcomes_that_the_value_is_no_mean_of_give_no_paired_interval() -> None:
    score = Score(metric="f1", value=70.0, num_samples=4, outcomes=np.array([1.0, 0.0, 1.0, 1.0]))
    assert measure_accuracy(score, baseline=score).change_low is None


@pytest.mark.parametrize(
    "other",
    [
        Score(metric="top5", value=50.0, num_samples=10),
        Score(metric="top1", value=50.0, num_samples=9),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(other: Score) -> None:
    score = Score(metric="top1", value=50.0, num_samples=10)
    with pytest.raises(BadInput, match="cannot be compared"):
        measure_accuracy(score, baseline=other)
