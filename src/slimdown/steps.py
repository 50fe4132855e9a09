"""A run's steps, each made once: the original, the stages, the deployments, the measurements."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from slimdown.bench import check_untouched, time_artifacts
from slimdown.core import (
    Accuracy,
    Artifact,
    Context,
    Json,
    Measurement,
    Progress,
    Score,
    Stage,
    Step,
    Target,
    Task,
)
from slimdown.distill import seed_everything
from slimdown.errors import Interrupted
from slimdown.measure import (
    MeasureSettings,
    clock_for,
    count_macs,
    count_parameters,
    describe_environment,
    measure_accuracy,
)
from slimdown.plan import ORIGINAL, Planned
from slimdown.saved import GRAPH, save_graph
from slimdown.store import (
    StepFolder,
    fingerprint_model,
    fingerprint_score,
    fingerprint_task,
    key_of,
    settings_of,
)
from slimdown.targets.audit import name_reasons
from slimdown.version import __version__


@dataclass(frozen=True, kw_only=True)
class Made:
    """A step that is whole: the hash of its origin, its module, its record, its score in torch."""

    key: str
    module: nn.Module
    step: Step
    score: Score | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run's folder, and what all its steps share."""

    folder: Path
    task: Task
    context: Context

    def take(self, model: nn.Module) -> Made:
        """Judge the model that the user brought."""
        parts = [__version__, fingerprint_model(model), fingerprint_task(self.task)]
        score = None
        if not hasattr(self.task, "fingerprint"):  # only judging tells whether its images changed
            score = self.task.score(model)
            parts.append(fingerprint_score(score))
        folder = self._open(ORIGINAL, key_of(*parts))
        if not folder.is_done:
            folder.save_tensors("example", {"input": self.task.example_input})
            self._finish(
                folder,
                model,
                kind="original",
                parent=None,
                score=score or self.task.score(model),
                facts=_describe_data(self.task),
            )
        return _load(folder, model)

    def make(self, plan: Planned, made: Mapping[str, Made]) -> Made:
        """Apply a stage to its parent's module, unless that was done before."""
        assert plan.stage is not None
        assert plan.parent is not None
        stage, parent = plan.stage, made[plan.parent]
        settings = settings_of(stage)
        key = key_of(parent.key, stage.kind, settings, self.context.seed)
        folder = self._open(plan.name, key)
        if folder.is_done:
            return _load(folder, self._restore(folder, stage, parent))
        context = replace(
            self.context,
            find_clock=clock_for,
            save_checkpoint=folder.save_checkpoint,
            load_checkpoint=folder.load_checkpoint,
        )
        seed_everything(self.context.seed)
        was_begun = folder.load_checkpoint() is not None
        start = time.monotonic()
        result = stage(parent.module, self.task, context)
        seconds = None if was_begun else time.monotonic() - start
        folder.save_record("plan.json", result.structure)
        folder.save_tensors("model", result.model.state_dict())
        if result.structure.get("delivery") == "graph":
            save_graph(result.model, result.structure["input"], folder.path / GRAPH)
        # Go on from what a resumed run would load, so that both end with the same bits.
        module = self._restore(folder, stage, parent)
        self._finish(
            folder,
            module,
            kind=stage.kind,
            parent=plan.parent,
            score=self.task.score(module),
            settings=settings,
            facts=result.facts,
            seconds=seconds,
        )
        return _load(folder, module)

    def measure_in_torch(self, made: Made) -> Measurement:
        """The torch module's accuracy; its speed is measured where it is deployed."""
        return Measurement(step=made.step.name, runtime="torch", accuracy=self._compare(made.score))

    def measure_on(
        self, target: Target, branch: Sequence[Made], settings: MeasureSettings
    ) -> list[Measurement]:
        """Deploy each step of a target's way, judge it there, and time all of them interleaved."""
        rows: list[Measurement] = []
        kept_float: dict[str, str] = {}
        for index, made in enumerate(branch):
            self.context.show(Progress(f"deploy on {target.name}", index, len(branch)))
            kept_float |= made.step.facts.get("kept_float") or {}
            rows.append(self._deploy(target, made, kept_float))
        self.context.show(Progress(f"deploy on {target.name}", len(branch), len(branch)))
        hashes = [row.artifact.sha256 for row in rows if row.artifact is not None]
        environment = describe_environment()
        # Timings hold for the machine and the runtime that they were taken on.
        where = [target.check(), environment["cpu"]]
        folder = self._open(f"measure/{target.name}", key_of(hashes, settings_of(settings), where))
        if not folder.is_done:
            self.context.show(Progress(f"measure on {target.name}", 0, 1))
            inputs = self.task.example_input
            timed = time_artifacts(
                target, rows, folder=self.folder, inputs=inputs, settings=settings
            )
            folder.save_record("measurements.json", timed)
            folder.save_record("environment.json", environment)
            folder.finish()
            self.context.show(Progress(f"measure on {target.name}", 1, 1))
        timings = folder.load_record("measurements.json", list[Measurement])
        # Scores come from the deployments: they may be judged anew while the timings stay.
        return [
            replace(row, latency=timing.latency, peak_memory_bytes=timing.peak_memory_bytes)
            for row, timing in zip(rows, timings, strict=True)
        ]

    def environment(self, target: Target) -> Json:
        """The machine as it was when the target's artifacts were measured."""
        return StepFolder(self.folder / "measure" / target.name, key="").load_record(
            "environment.json", Json
        )

    def _deploy(self, target: Target, made: Made, kept_float: Mapping[str, str]) -> Measurement:
        """Export a step's module, load the artifact again and judge it as the module was judged.

        `kept_float` says why quantization left a layer in float: layer -> why.
        """
        name = made.step.name
        folder = self._open(
            f"deploy/{target.name}/{name}",
            key_of(made.key, target.name, target.check(), settings_of(target)),
        )
        if not folder.is_done:
            artifact = target.export(made.module, self.task, folder.path)
            artifact = replace(artifact, audit=name_reasons(artifact.audit, kept_float))
            predict = target.load(artifact, num_threads=torch.get_num_threads())
            folder.save_score(self.task.score(predict))
            folder.save_record("artifact.json", artifact.relative_to(self.folder))
            folder.finish()
        artifact = folder.load_record("artifact.json", Artifact)
        check_untouched(artifact.under(self.folder))
        return Measurement(
            step=name,
            runtime=target.name,
            accuracy=self._compare(folder.load_score(), reference=made.score),
            size_bytes=artifact.size_bytes,
            artifact=artifact,
        )

    def _open(self, name: str, key: str) -> StepFolder:
        """Begin a step's folder; the clean point at which a run stops when asked to."""
        if self.context.stop_requested():
            raise Interrupted(f"stopped before {name}; run again to go on from there")
        folder = StepFolder(self.folder / name, key)
        folder.begin()
        return folder

    def _restore(self, folder: StepFolder, stage: Stage, parent: Made) -> nn.Module:
        structure = folder.load_record("plan.json", Json)
        module = stage.rebuild(parent.module, structure, self.task.example_input)
        module.load_state_dict(folder.load_tensors("model"))
        return module.eval()

    def _finish(
        self,
        folder: StepFolder,
        module: nn.Module,
        *,
        kind: str,
        parent: str | None,
        score: Score | None,
        settings: Json | None = None,
        facts: Json | None = None,
        seconds: float | None = None,
    ) -> None:
        step = Step(
            name=folder.path.name,
            kind=kind,
            parent=parent,
            settings=settings or {},
            facts=facts or {},
            num_parameters=count_parameters(module),
            macs=count_macs(module, self.task.example_input),
            seconds=seconds,
        )
        folder.save_score(score)
        folder.save_record("step.json", step)
        folder.finish()

    def _compare(self, score: Score | None, *, reference: Score | None = None) -> Accuracy | None:
        """A score beside that of the original; None where the task does not judge."""
        if score is None:
            return None
        baseline = StepFolder(self.folder / ORIGINAL, key="").load_score()
        return measure_accuracy(score, baseline=baseline, reference=reference)


def _describe_data(task: Task) -> Json:
    """What a task tells of its data: their hash, that of the calibration images, and remarks."""
    told = {name: getattr(task, name, None) for name in ("fingerprint", "calibration_hash")}
    return {**told, "notes": list(getattr(task, "notes", ()))}


def _load(folder: StepFolder, module: nn.Module) -> Made:
    return Made(
        key=folder.key,
        module=module,
        step=folder.load_record("step.json", Step),
        score=folder.load_score(),
    )
