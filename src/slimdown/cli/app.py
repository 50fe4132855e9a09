"""The command line: each command a few lines over the library.

Results go to stdout; progress and errors go to stderr. Exit codes: see `slimdown.errors`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from slimdown.bench import bench_run
from slimdown.cli.endings import exit_codes, stopping_on_request
from slimdown.cli.notices import telling_notices
from slimdown.cli.progress import showing_progress
from slimdown.core import Report
from slimdown.demo import run_demo
from slimdown.doctor import examine, render_checkup
from slimdown.dry_run import look_ahead, render_outlook
from slimdown.errors import BUDGET_NOT_MET
from slimdown.inspect import inspect_model, parse_shape, render_inspection
from slimdown.load import ModelSource
from slimdown.pipeline import run_recipe
from slimdown.recipe import load_recipe, recipe_schema
from slimdown.report import read_results, render_terminal, write_report
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
    target: Annotated[
        list[str] | None, typer.Option(help="A runtime; may be given again. [onnxruntime]")
    ] = None,
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
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override: -s prune.macs=0.5"),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="The run's folder; default: runs/NAME.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it needs; touch nothing.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seeds every step.")] = None,
) -> None:
    """Run a recipe, or go on where it was stopped. A model given as MODULE:FACTORY runs that code.

    Ctrl-C stops at the next clean point; the same command goes on from there.
    """
    overrides = [*(settings or ()), *([] if seed is None else [f"seed={seed}"])]
    chosen = load_recipe(recipe, overrides)
    folder = folder or Path("runs") / chosen.name
    if dry_run:
        outlook = look_ahead(chosen, folder=folder)
        out.print(render_outlook(outlook))
        raise typer.Exit(outlook.exit_code)
    with stopping_on_request() as stop_requested, showing_progress(err) as show:
        report = run_recipe(chosen, folder=folder, show=show, stop_requested=stop_requested)
    _conclude(report, folder)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="torchvision:resnet50, package.module:factory, …")],
    weights: Annotated[Path | None, typer.Option(help="A .safetensors or .pt file.")] = None,
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


def _conclude(report: Report, folder: Path) -> None:
    """Show what a run found; a missed budget is exit code 3."""
    _show(report, folder)
    if not report.budget_met:
        missed = [f"{each.limit} on {each.target}" for each in report.verdicts if not each.met]
        err.print(f"budget not met: {', '.join(missed)}; the artifacts are kept", soft_wrap=True)
        raise typer.Exit(BUDGET_NOT_MET)
