"""Keeping to a latency, with clocks that are exact, biased, staircases, or out of reach."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import Var
from slimdown.core import Context
from slimdown.errors import Interrupted, RecipeError
from slimdown.prune import Prune
from slimdown.prune.budget.pace import TOLERANCE, Attempt, Chosen, approach, nearest


def work(operation):
    """Milliseconds of a machine that does a million multiplications each."""
    return math.prod(operation.shapes[0]) * operation.shapes[1][0] / 1e6


@pytest.fixture
def net():
    """Convolutions of one kind, so that the fake machine's time is all there is."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(64, 32, 1), nn.Flatten(2), nn.Linear(64, 4)).eval()


def prune(net, clock, task_for, **settings):
    settings = {"importance": "l2", "compensate": False, "target": "fake", **settings}
    context = Context(find_clock=lambda target: clock)
    return Prune(**settings)(net, task_for(16, 8, 8), context)


def test_a_clock_that_the_table_knows_all_of_is_met_at_once(net, fake_clock, task_for):
    clock = fake_clock(work)
    facts = prune(net, clock, task_for, latency=0.5, round_to=1).facts["latency"]
    assert len(facts["attempts"]) == 1
    assert facts["measured"] == pytest.approx(facts["predicted"], rel=1e-6)
    assert 0.475 <= facts["measured"] <= 0.5
    assert facts["runtime"] == "fake 1"
    assert facts["met"] is True
    json.dumps(facts)


@pytest.mark.parametrize("asked", [0.8, 0.6])
def test_a_biased_table_is_corrected(net, fake_clock, task_for, asked):
    clock = fake_clock(work, overhead_ms=0.3)  # of a network, whatever its widths
    facts = prune(net, clock, task_for, latency=asked, round_to=1).facts["latency"]
    assert len(facts["attempts"]) > 1
    assert facts["measured"] == pytest.approx(asked, rel=0.05)


def test_widths_go_by_what_the_clock_likes_unless_told_otherwise(net, fake_clock, task_for):
    clock = fake_clock(work, round_to=16)
    widths = prune(net, clock, task_for, latency=0.6).facts["widths"]
    assert widths["0"][1] % 16 == widths["2"][1] % 16 == 0
    finer = prune(net, clock, task_for, latency=0.6, round_to=4).facts["widths"]
    assert finer["0"][1] % 16 or finer["2"][1] % 16


def test_a_width_that_saves_nothing_is_passed_over(net, fake_clock, task_for):
    def staircase(operation):
        """A machine that computes whole blocks of 32 channels."""
        (_, channels, *rest), (out, *_) = operation.shapes[:2]
        blocks = math.ceil(channels / 32) * math.ceil(out / 32)
        return blocks * 1024 * math.prod(rest) / 1e6

    result = prune(net, fake_clock(staircase), task_for, latency=0.6, round_to=8)
    assert result.facts["latency"]["measured"] <= 0.6 * 1.05


def test_a_latency_out_of_reach_tells_the_least_that_was_measured(net, fake_clock, task_for):
    clock = fake_clock(work, overhead_ms=2.0)
    with pytest.raises(RecipeError, match=r"prune.latency=0.1 cannot be reached") as caught:
        prune(net, clock, task_for, latency=0.1)
    least = float(str(caught.value).split("fraction is ")[1].split()[0])
    assert 0.1 < least < 1
    got = prune(net, clock, task_for, latency=least).facts["latency"]
    assert got["measured"] == pytest.approx(least, rel=0.05)


def test_without_target_or_clock_it_says_what_is_missing(net, task_for):
    task = task_for(16, 8, 8)
    with pytest.raises(RecipeError, match=r"prune\.latency needs a target"):
        Prune(latency=0.5, importance="l2")(net, task)
    with pytest.raises(RecipeError, match="without a clock: run this stage as part of a recipe"):
        Prune(latency=0.5, importance="l2", target="openvino")(net, task)


def test_each_target_of_a_recipe_gets_its_own(fake_clock):
    class Target:
        name = "openvino"

    assert Prune(latency=0.5).for_target(Target()) == Prune(latency=0.5, target="openvino")
    chosen = Prune(latency=0.5, target="onnxruntime")
    assert chosen.for_target(Target()) is chosen
    assert Prune(macs=0.5).for_target(Target()) == Prune(macs=0.5)


# ------------------------------------------------------------------------------ the correction


LEAF = Var(1000)


def choose(goal):
    width = max(100, round(1000 * goal))
    kept = {LEAF: torch.arange(1000) < width}
    return Chosen(kept=kept, predicted=width / 1000)


@pytest.mark.parametrize(
    "truth",
    [
        lambda share: share,
        lambda share: 0.2 + 0.8 * share,
        lambda share: share**2,
        lambda share: share**0.5,
        lambda share: math.ceil(share * 30) / 30,
    ],
)
@pytest.mark.parametrize("asked", [0.7, 0.5, 0.35])
def test_the_correction_gets_near_within_a_few_attempts(truth, asked):
    attempts = approach(asked, choose, lambda kept: truth(float(kept[LEAF].float().mean())))
    assert abs(nearest(attempts, asked).measured / asked - 1) <= TOLERANCE
    assert len(attempts) <= 5


def test_the_correction_ends_where_nothing_new_can_be_tried():
    attempts = approach(0.3, choose, lambda kept: 0.5 + float(kept[LEAF].float().mean()))
    assert attempts[-1].measured == pytest.approx(0.6)
    assert not attempts[-1].is_near(0.3)


def test_granularity_is_no_reason_to_go_on():
    def coarse(goal):
        return choose(0.9 if goal >= 0.9 else 0.3)

    attempts = approach(0.6, coarse, lambda kept: float(kept[LEAF].float().mean()))
    assert [round(attempt.measured, 1) for attempt in attempts] == [0.3, 0.9]


def test_what_is_slower_than_asked_is_taken_only_where_nothing_else_is():
    def attempt(measured):
        return Attempt(**vars(choose(measured)), goal=measured, measured=measured)

    slow, fast, slowest = attempt(0.56), attempt(0.3), attempt(0.9)
    assert nearest([slow, fast, slowest], 0.5) is fast
    assert nearest([slow, slowest], 0.5) is slow
    just = attempt(0.52)  # within the tolerance
    assert nearest([just, fast], 0.5) is just


def test_a_latency_between_two_widths_is_kept_to_and_one_that_is_missed_is_told(
    net, fake_clock, task_for, monkeypatch
):
    clock = fake_clock(work, overhead_ms=0.3)
    facts = prune(net, clock, task_for, latency=0.6, round_to=16).facts["latency"]
    assert facts["met"] is True
    assert facts["measured"] <= 0.6 * 1.05
    monkeypatch.setattr("slimdown.prune.budget.pace.MAX_ATTEMPTS", 1)
    facts = prune(net, clock, task_for, latency=0.6, round_to=16).facts["latency"]
    assert facts["met"] is False
    assert facts["measured"] > 0.6 * 1.05


def test_a_stop_is_heeded_between_attempts():
    measured = []

    def measure(kept):
        measured.append(kept)
        return 0.9

    with pytest.raises(Interrupted, match="stopped while keeping to a latency"):
        approach(0.5, choose, measure, stop_requested=lambda: len(measured) == 1)
    assert len(measured) == 1


def test_a_network_of_no_length_is_compared_with_all_the_same(net, fake_clock, task_for):
    class Empty(nn.Module):
        """False where its truth is asked for."""

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

        def __len__(self):
            return 0

    class Watched(fake_clock):
        deployed = ()

        def deploy(self, model, example_input):
            self.deployed += (model,)
            return super().deploy(model, example_input)

    clock, task, original = Watched(work), task_for(16, 8, 8), Empty()
    analysis = analyze(capture(net, task.example_input))
    stage = Prune(latency=0.6, importance="l2", target="fake")
    scores = stage.score(analysis, task)
    context = Context(find_clock=lambda target: clock)
    stage.keep_pace(analysis, scores, task, context, original=original)
    assert clock.deployed[0] is original


def test_all_of_the_latency_changes_nothing(net, fake_clock, task_for):
    result = prune(net, fake_clock(work, overhead_ms=0.1), task_for, latency=1.0)
    assert not result.structure["parameters"]
    assert result.facts["latency"]["measured"] == pytest.approx(1.0)
