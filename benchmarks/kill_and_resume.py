"""Kill a run with SIGKILL at random moments; each time it must resume and end with the same files.

    python benchmarks/kill_and_resume.py recipes/cifar10-resnet20.yaml -s distill.epochs=2

First the recipe runs undisturbed. Then, `--kills` times in a folder of its own: start it, kill it
at a random moment of the undisturbed run's time, start it again, and compare the hash of every
deployed file. Prints one line a kill; the exit code is the number of differences.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill-and-resume"))
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out} exists, and what is whole there would not be made again")

    command = [sys.executable, "-m", "slimdown", "run", str(options.recipe)]
    for setting in options.set:
        command += ["-s", setting]
    start = time.monotonic()
    run(command, options.out / "undisturbed")
    seconds = time.monotonic() - start
    wanted = deployed_hashes(options.out / "undisturbed")
    print(f"undisturbed: {seconds:.0f} s, {len(wanted)} artifacts", flush=True)

    moments = random.Random(options.seed)
    differences = 0
    for index in range(options.kills):
        folder = options.out / f"killed-{index:02d}"
        moment = moments.uniform(0, seconds)
        while (whole := kill_after(moment, command, folder)) is None:
            shutil.rmtree(folder)  # it had come to its end before: too late to kill it
            moment = moments.uniform(0, moment)
        run(command, folder)
        equal = deployed_hashes(folder) == wanted
        differences += not equal
        print(
            f"kill {index + 1}: after {moment:.1f} s with {whole} steps whole -> "
            f"{'the same files' if equal else 'DIFFERENT FILES'}",
            flush=True,
        )
    return differences


def run(command: list[str], folder: Path) -> None:
    """Run to the end; a budget that was not met (exit code 3) is an end too."""
    done = subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}")


def kill_after(seconds: float, command: list[str], folder: Path) -> int | None:
    """Start the run, kill it, and count the steps that were whole; None if it ended before."""
    process = subprocess.Popen(
        [*command, "--out", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(timeout=seconds)
        return None
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return len(list(folder.rglob("DONE")))


def deployed_hashes(folder: Path) -> dict[str, str]:
    """Hash by "runtime/step", from the run's own results."""
    report = json.loads((folder / "results.json").read_text())
    return {
        f"{row['runtime']}/{row['step']}": row["artifact"]["sha256"]
        for row in report["measurements"]
        if row["artifact"] is not None
    }


if __name__ == "__main__":
    raise SystemExit(main())
