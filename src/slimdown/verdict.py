"""Whether the deployed artifacts keep to the budget."""

from __future__ import annotations

from slimdown.core import Budget, Measurement, Report, Verdict
from slimdown.plan import ORIGINAL

ROUNDING = 1e-9
"""Points: to a computer 88.0 - 87.3 is a little more than 0.7, and must not break that budget."""


def judge(report: Report, budget: Budget) -> tuple[Verdict, ...]:
    """Hold the last artifact of each target against each limit that the budget sets.

    The drop is that of the deployed artifact below the model that the user brought, and the
    speed-up is over that same model on the same target. What was not measured counts as not met:
    a promise that nobody checked is not kept.
    """
    targets = dict.fromkeys(m.runtime for m in report.measurements if m.artifact is not None)
    return tuple(verdict for target in targets for verdict in _judge_target(report, budget, target))


def _judge_target(report: Report, budget: Budget, target: str) -> list[Verdict]:
    before = report.measurement(ORIGINAL, target)
    after = report.measurement(report.final_step(target).name, target)
    assert before is not None, "the original is deployed on every target"
    assert after is not None, "the last step is deployed on every target"
    verdicts: list[Verdict] = []
    if (most := budget.max_drop) is not None:
        drop = _drop(after)
        met = drop is not None and drop <= most + ROUNDING
        verdicts.append(Verdict(target=target, limit="max_drop", allowed=most, found=drop, met=met))
    if (least := budget.min_speedup) is not None:
        ratio = _speedup(before, after)
        met = ratio is not None and ratio >= least
        verdicts.append(
            Verdict(target=target, limit="min_speedup", allowed=least, found=ratio, met=met)
        )
    if (most := budget.max_size) is not None:
        size = after.size_bytes
        met = size is not None and size <= most
        verdicts.append(Verdict(target=target, limit="max_size", allowed=most, found=size, met=met))
    return verdicts


def _drop(after: Measurement) -> float | None:
    if after.accuracy is None or after.accuracy.change is None:
        return None
    return 0.0 - after.accuracy.change  # not -0.0 where nothing changed


def _speedup(before: Measurement, after: Measurement) -> float | None:
    if before.latency is None or after.latency is None:
        return None
    return before.latency.median_ms / after.latency.median_ms
