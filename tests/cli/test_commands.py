"""The commands, their exit codes and where they print."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from slimdown.errors import (
    BadInput,
    Interrupted,
    MissingExtra,
    OutOfResources,
    SlimdownError,
    Unsafe,
)
from slimdown.recipe import load_recipe, recipe_schema
from slimdown.targets import find_target
from slimdown.version import __version__

Slimdown = Callable[..., Result]


def folder_is_untouched(recipe: Path) -> bool:
    return {path.name for path in recipe.parent.iterdir()} == {"net.py", recipe.name}


def test_version(slimdown: Slimdown) -> None:
    assert slimdown("--version").output == f"{__version__}\n"


def test_help_lists_the_commands_and_exit_codes(slimdown: Slimdown) -> None:
    text = slimdown("--help").output
    commands = "demo run quantize inspect bench report doctor schema"
    for word in (*commands.split(), "Exit codes"):
        assert word in text


def test_schema_prints_the_schema(slimdown: Slimdown) -> None:
    assert json.loads(slimdown("schema").stdout) == recipe_schema()


def test_doctor(slimdown: Slimdown) -> None:
    result = slimdown("doctor")
    assert result.exit_code == 0
    assert "onnxruntime" in result.stdout


@pytest.mark.parametrize("options", [[], ["--keep-slower"]])
def test_keep_slower_is_an_override_of_the_recipe(
    slimdown: Slimdown, recipe: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    taken = []

    def stop(chosen: Any, **rest: Any) -> None:
        taken.append(chosen)
        raise Interrupted

    monkeypatch.setattr("slimdown.cli.app.run_recipe", stop)
    slimdown("run", recipe, *options)
    assert taken == [load_recipe(recipe, ["keep_slower=true"] if options else [])]
    assert taken[0].keep_slower is bool(options)


# ---------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "small.yaml", "--nonsense"], "No such option"),
        (["run", "small.yaml", "--seed", "x"], "--seed"),
        (["run", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        (["run", "small.yaml", "-s", "prune.mac=1"], "did you mean 'macs'?"),
        (["run", "small.yaml", "-s", "nonsense"], "an override is KEY=VALUE"),
        (["run", "small.yaml", "--seed", "-1"], "seed must be in"),
        (["run", "small.yaml", "-s", "data=", "--dry-run"], "names no model or no data"),
        (["inspect", "resnet50"], "model.reference is"),
        (["inspect", "torchvision:resnet51"], "did you mean 'resnet50'"),
        (["inspect", "torchvision:resnet50", "--input", "224"], "--input is CxHxW"),
    ],
)
def test_usage_and_recipe_errors_are_2(
    slimdown: Slimdown, recipe: Path, arguments: list[str], message: str
) -> None:
    result = slimdown(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert folder_is_untouched(recipe)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MissingExtra("openvino", "openvino"), 4),
        (BadInput("the weights do not fit"), 5),
        (Unsafe("the weights are a pickle"), 6),
        (OutOfResources("the disk is full"), 7),
        (MemoryError(), 7),
        (Interrupted("stopped before 01-prune; run again to go on from there"), 130),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: str(value)[:20],
)
def test_errors_of_a_run_have_their_exit_codes(
    slimdown: Slimdown,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("slimdown.cli.app.run_recipe", fail)
    result = slimdown("run", recipe)
    assert result.exit_code == code
    assert result.stdout == ""
    if isinstance(error, SlimdownError | Interrupted):
        assert str(error) in result.stderr


def test_a_bug_is_1_with_its_traceback(
    slimdown: Slimdown, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("slimdown.cli.app.run_recipe", fail)
    result = slimdown("run", recipe)
    assert result.exit_code == 1
    assert isinstance(result.exception, AssertionError)


def test_a_model_file_that_is_missing_is_5(slimdown: Slimdown, recipe: Path) -> None:
    result = slimdown("run", recipe, "-s", "model.weights=none.safetensors")
    assert result.exit_code == 5
    assert "none.safetensors" in result.stderr


def test_code_in_a_recipe_is_6(slimdown: Slimdown, recipe: Path) -> None:
    recipe.write_text(f"stages: !!python/object/apply:os.mkdir ['{recipe.parent}/owned']")
    result = slimdown("run", recipe)
    assert result.exit_code == 6
    assert not (recipe.parent / "owned").exists()


def test_a_run_folder_that_cannot_be_read_is_told(slimdown: Slimdown, recipe: Path) -> None:
    for command in ("bench", "report"):
        result = slimdown(command, recipe.parent / "nowhere")
        assert result.exit_code == 5
        assert "nowhere" in result.stderr


# ------------------------------------------------------------------------------------- dry run


def test_dry_run_touches_nothing(slimdown: Slimdown, recipe: Path) -> None:
    result = slimdown("run", recipe, "--dry-run")
    assert result.exit_code == 0
    assert "02-quantize-onnxruntime" in result.stdout
    assert "64 calibration images" in result.stdout
    assert folder_is_untouched(recipe)


def test_dry_run_tells_a_missing_extra_with_its_line(
    slimdown: Slimdown, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_missing(self: object) -> str:
        raise MissingExtra("openvino", "openvino")

    monkeypatch.setattr(type(find_target("openvino")), "check", is_missing)
    for options in ([], ["--dry-run"]):
        result = slimdown("run", recipe, "-s", "targets=[openvino]", *options)
        assert result.exit_code == 4
        assert "pip install 'slimdown[openvino]'" in result.output
    assert folder_is_untouched(recipe)


# ----------------------------------------------------------------------------------- true runs


def test_a_run_and_what_can_be_done_with_it(slimdown: Slimdown, recipe: Path) -> None:
    result = slimdown("run", recipe, "--seed", "3")
    assert result.exit_code == 0, result.output
    run = recipe.parent / "runs" / "small"
    assert "report: runs/small/report.html" in result.stdout
    assert (run / "report.html").is_file()
    # The saved recipe is the one that ran, with what the command line said.
    assert load_recipe(run / "recipe.yaml") == load_recipe(recipe, ["seed=3"])

    (run / "report.html").unlink()
    assert slimdown("report", run).exit_code == 0
    assert (run / "report.html").is_file()

    result = slimdown("bench", run)
    assert result.exit_code == 0, result.output
    assert (run / "bench" / "report.html").is_file()

    # Run again, only the budget is judged anew; missing it is a result and not an error.
    result = slimdown("run", recipe, "--seed", "3", "-s", "budget.min_speedup=1000")
    assert result.exit_code == 3
    assert "report: runs/small/report.html" in result.stdout
    assert "budget not met: min_speedup on onnxruntime" in result.stderr


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "slimdown", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )


def wait_for(process: subprocess.Popen[str], word: str) -> str:
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if word in line:
            return said
    raise AssertionError(f"the process ended without saying {word!r}: {said}")


def test_the_process_ends_with_the_exit_code(recipe: Path) -> None:
    process = start("run", recipe, "-s", "prune.macs=50")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert err.startswith("error: -s prune.macs=50: prune.macs ")


def test_a_signal_stops_at_a_clean_point_and_the_next_run_goes_on(recipe: Path) -> None:
    arguments = ("run", recipe, "-s", "stages=[distill: {epochs: 100000}]")
    process = start(*arguments)
    wait_for(process, "distill")
    process.send_signal(signal.SIGINT)
    err = wait_for(process, "next clean point")
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped: " in rest
    assert "run again to go on" in rest
    assert "Traceback" not in err + rest
    step = recipe.parent / "runs" / "small" / "01-distill"
    assert (step / "checkpoint.pt").is_file()
    assert not (step / "DONE").exists()

    process = start(*arguments)
    first = re.search(r"distill  (\d+)/", wait_for(process, "distill"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert first is not None
    assert int(first[1]) > 1  # a fresh run begins by telling of its first step


def test_the_second_signal_ends_at_once(recipe: Path) -> None:
    process = start("run", recipe, "-s", "stages=[distill: {epochs: 100000}]")
    wait_for(process, "distill")
    process.send_signal(signal.SIGINT)
    wait_for(process, "next clean point")
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert time.monotonic() - began < 20
