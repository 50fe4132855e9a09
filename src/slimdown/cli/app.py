"""The command line: each command a few lines over the library.

Results go to stdout; progress and errors go to stderr. Exit codes: see `slimdown.errors`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from slimdown.bench import bench_run
from slimdown.cli.endings import exit_codes, stopping_on_request
from slimdown.cli.notices import telling_notices
from slimdown.cli.progress import showing_progress
from slimdown.cli.quantize import choices, has_random_weights, quantize_document
from slimdown.core import Report
from slimdown.demo import run_demo
from slimdown.doctor import examine, render_checkup
from slimdown.dry_run import look_ahead, render_outlook
from slimdown.errors import BUDGET_NOT_MET
from slimdown.inspect import inspect_model, parse_shape, render_inspection
from slimdown.load import ModelSource
from slimdown.pipeline import run_recipe
from slimdown.quantize import PROFILES, Quantize
from slimdown.quantize.calibrate import CALIBRATIONS
from slimdown.quantize.ladder import EFFORTS
from slimdown.quantize.stage import PRECISIONS
from slimdown.recipe import (
    Recipe,
    complete,
    load_recipe,
    make_recipe,
    recipe_schema,
    write_document,
)
from slimdown.report import deployed_targets, read_results, render_terminal, write_report
from slimdown.version import __version__


class Commands(typer.core.TyperGroup):
    """All commands, ending with the exit codes of `slimdown.errors`."""

    def invoke(self, ctx: Any) -> Any:
        debug = ctx.params["debug"]
        with exit_codes(debug=debug), telling_notices(err, debug=debug):
            return super().invoke(ctx)


app = typer.Typer(
    name="slimdown",
    cls=Commands,
    help="Make a trained vision network small and fast, and prove it where it will run.",
    epilog="Exit codes: 0 ok, 2 usage or recipe, 3 budget not met, 4 missing extra, 5 bad input, "
    "6 refused as unsafe, 7 out of disk or memory, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Argument(help="torchvision:resnet50, net.onnx, module:factory, …")]
Weights = Annotated[Path | None, typer.Option(help="A .safetensors or .pt file.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="A runtime; may be given again.", show_default="onnxruntime"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override: -s budget.max_drop=1"),
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", help="The run's folder; default: runs/NAME.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and what it needs; touch nothing.")
]
Seed = Annotated[int | None, typer.Option(help="Seeds every step.")]
KeepSlower = Annotated[
    bool,
    typer.Option("--keep-slower", help="Take INT8 also where it is slower; say nothing of it."),
]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/demo.")]


def main() -> None:
    """Run the command line."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show every warning, and the traceback of every error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Take what all commands have in common."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="The run's folder.")] = Path("runs/demo"),
    target: Targets = None,
) -> None:
    """Train a small teacher on embedded digits, compress it, deploy it, report. No network."""
    with stopping_on_request() as stop_requested, showing_progress(err) as show:
        report = run_demo(
            folder, targets=target or ("onnxruntime",), show=show, stop_requested=stop_requested
        )
    _conclude(report, folder)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    settings: Settings = None,
    folder: OutFolder = None,
    dry_run: DryRun = False,
    seed: Seed = None,
    keep_slower: KeepSlower = False,
) -> None:
    """Run a recipe, or go on where it was stopped. A model given as MODULE:FACTORY runs that code.

    Ctrl-C stops at the next clean point; the same command goes on from there.
    """
    _run(load_recipe(recipe, _overrides(settings, seed, keep_slower)), folder, dry_run=dry_run)


@app.command()
def quantize(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="A folder: train/<class>/… and test/<class>/…, or <class>/… alone, or images "
            "without labels. Or an .npz, or: digits."
        ),
    ],
    weights: Weights = None,
    target: Targets = None,
    precision: Annotated[
        str | None, typer.Option(help=choices(PRECISIONS), show_default=Quantize.precision)
    ] = None,
    weight_bits: Annotated[int | None, typer.Option(help="2 to 8.", show_default="8")] = None,
    activation_bits: Annotated[int | None, typer.Option(help="2 to 8.", show_default="8")] = None,
    calibration: Annotated[
        str | None, typer.Option(help=choices(CALIBRATIONS), show_default=Quantize.calibration)
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help=choices(EFFORTS), show_default=Quantize.effort)
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(help="Images that calibrate.", show_default=str(Quantize.num_images)),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Bring sensitive layers back until the outputs are so near: 0.1 is a tenth.",
            show_default="bring back none",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Layers to keep in float; may be given again."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help=choices(PROFILES), show_default="the target's")
    ] = None,
    settings: Settings = None,
    folder: OutFolder = None,
    dry_run: DryRun = False,
    seed: Seed = None,
    keep_slower: KeepSlower = False,
) -> None:
    """Quantize a model, deploy and measure it: a recipe of one stage, which is printed at the end.

    What has no option is set as in a recipe: -s model.options.num_classes=6. Ctrl-C stops at the
    next clean point; the same command goes on. A model given as MODULE:FACTORY runs that code.
    """
    document = quantize_document(
        model,
        data,
        weights=weights,
        targets=target,
        settings={
            "precision": precision,
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "calibration": calibration,
            "effort": effort,
            "num_images": num_images,
            "max_error": max_error,
            "exclude": exclude,
            "profile": profile,
        },
    )
    document = complete(document, _overrides(settings, seed, keep_slower), folder=Path.cwd())
    written = f"this command as a recipe:\n\n{write_document(document.values)}"
    recipe = make_recipe(document)
    if recipe.model is not None and has_random_weights(recipe.model):
        err.print(
            f"note: {model} has random weights: give --weights, or -s model.options.pretrained=true"
            " for the official ones",
            markup=False,
            soft_wrap=True,
        )
    _run(recipe, folder, dry_run=dry_run, ending=written)


@app.command()
def inspect(
    model: Model,
    weights: Weights = None,
    shape: Annotated[str, typer.Option("--input", help="CxHxW")] = "3x224x224",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's size, its cost, and the groups of channels that go together."""
    source = ModelSource(reference=model, weights=weights)
    inspection = inspect_model(source, shape=parse_shape(shape))
    if as_json:
        print(json.dumps(inspection.to_json(), indent=2))
    else:
        out.print(render_inspection(inspection))


@app.command()
def bench(folder: RunFolder) -> None:
    """Measure the deployed artifacts of a run again, on this machine."""
    _conclude(bench_run(folder), folder / "bench")


@app.command()
def report(folder: RunFolder) -> None:
    """Write the report of a run again, from its results."""
    found = read_results(folder)
    write_report(found, folder)
    _show(found, folder)


@app.command()
def doctor() -> None:
    """Show what is installed, what this machine can do, and what installs the rest."""
    out.print(render_checkup(examine()))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes."""
    print(json.dumps(recipe_schema(), indent=2))


def _show(report: Report, folder: Path) -> None:
    """Print what a run found, and where its pages are."""
    out.print(render_terminal(report))
    out.print(f"report: {folder / 'report.html'}", markup=False, soft_wrap=True)


def _overrides(settings: list[str] | None, seed: int | None, keep_slower: bool) -> list[str]:
    overrides = [*(settings or ()), *([] if seed is None else [f"seed={seed}"])]
    return [*overrides, "keep_slower=true"] if keep_slower else overrides


def _run(recipe: Recipe, folder: Path | None, *, dry_run: bool, ending: str = "") -> None:
    """Run a recipe in its folder, or say what that would do; then print `ending`."""
    folder = folder or Path("runs") / recipe.name
    if dry_run:
        outlook = look_ahead(recipe, folder=folder)
        out.print(render_outlook(outlook))
        out.print(ending, end="", markup=False, soft_wrap=True)
        raise typer.Exit(outlook.exit_code)
    with stopping_on_request() as stop_requested, showing_progress(err) as show:
        report = run_recipe(recipe, folder=folder, show=show, stop_requested=stop_requested)
    paths = [f"recipe: {folder / 'recipe.yaml'}", *_name_artifacts(report, folder)]
    _conclude(report, folder, ending="\n".join([*paths, ending]))


def _name_artifacts(report: Report, folder: Path) -> Iterator[str]:
    """The file to take away, of each target."""
    for target in deployed_targets(report):
        found = report.measurement(report.final_step(target).name, target)
        assert found is not None
        assert found.artifact is not None
        yield f"{target}: {folder / found.artifact.path}"


def _conclude(report: Report, folder: Path, *, ending: str = "") -> None:
    """Show what a run found; a missed budget is exit code 3."""
    _show(report, folder)
    out.print(ending, end="", markup=False, soft_wrap=True)
    if not report.budget_met:
        missed = [f"{each.limit} on {each.target}" for each in report.verdicts if not each.met]
        err.print(f"budget not met: {', '.join(missed)}; the artifacts are kept", soft_wrap=True)
        raise typer.Exit(BUDGET_NOT_MET)
