"""Where an edited module goes wrong, and which submodules should run as graphs instead."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimdown.capture import Analysis
from slimdown.capture.call import modules_of
from slimdown.prune.delivery.attributes import is_torchs
from slimdown.prune.probe import Probe, Replay

MOST_TRACED = 0.5
"""The share of the parameters that one traced submodule may hold: more is a graph by itself."""

Print: TypeAlias = tuple[torch.Size, float]
"""What tells a tensor from another: its shape and a weighted sum of its values."""

_SAME = 1e-4
"""Relative difference of norms up to which two float32 tensors are taken for the same."""


def find_culprit(
    module: nn.Module, oracle: GraphModule, analysis: Analysis, probe: Probe
) -> str | None:
    """The first submodule to finish whose output is not the oracle's, or else to fail.

    `probe` is that of the pruned network.
    """
    wanted = _Outputs(analysis, oracle, probe).prints
    watched = copy.deepcopy(module).eval()
    seen: dict[str, list[Print]] = {}

    def watch(name: str, submodule: nn.Module) -> None:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if name in wanted and isinstance(output, Tensor):
                seen.setdefault(name, []).append(_print(output))

        submodule.register_forward_hook(hook)

    for name, submodule in watched.named_modules():
        watch(name, submodule)
    for training in (False, True):
        seen.clear()
        failed = None
        try:
            probe.first().outputs(watched.train(training))
        except Exception as failure:
            failed = _innermost(watched, failure)
        once = {name: prints[0] for name, prints in seen.items() if len(prints) == 1}
        wrong = [name for name, found in once.items() if not _agree(found, wanted[name])]
        if not training and wrong:
            return wrong[0]
        if failed is not None:
            return failed
    return None


def widen(
    model: nn.Module, analysis: Analysis, traced: Sequence[str], culprit: str | None
) -> tuple[str, ...] | None:
    """The submodules to trace once one more was found at fault; None where that leads nowhere.

    All of its kind are traced that prune something: they share its code. Where it is one of
    torch's own layers, or traced already, the code around it is to blame.
    """
    modules = dict(model.named_modules())
    called = _called(analysis) & modules.keys()
    name = culprit or ""
    while name and (name not in called or _is_layer(modules[name]) or _is_within(name, traced)):
        name = name.rpartition(".")[0]
    if not name:
        return None
    kind = type(modules[name])
    alike = {name} if kind is nn.Sequential else {n for n in called if type(modules[n]) is kind}
    names = sorted({*traced, *alike}, key=list(modules).index)
    outermost = tuple(n for n in names if not _is_within(n, set(names) - {n}))
    most = MOST_TRACED * _num_values(model)
    return None if any(_num_values(modules[n]) > most for n in outermost) else outermost


def lost_modules(model: nn.Module, analysis: Analysis, within: Collection[str]) -> list[str]:
    """The submodules that act in training only and left no operator in the graph: drop path.

    Only those within one of some modules are named; "" is the model itself.
    """
    called = {name for node in analysis.graph_module.graph.nodes for name in modules_of(node)}
    return [
        name
        for name, module in model.named_modules()
        if name not in called
        and not list(module.children())
        and not list(module.parameters())
        and ("" in within or _is_within(name, within))
        and _acts_in_training(module)
    ]


def _acts_in_training(module: nn.Module) -> bool:
    """Whether a module changes a tensor of ones in training mode, and does not in eval mode."""
    ones, twin = torch.ones(64, 2, 2, 2), copy.deepcopy(module)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            trained, passed = twin.train()(ones.clone()), twin.eval()(ones.clone())
    except Exception:  # it takes no such tensor, so it is none of those
        return False
    if not isinstance(trained, Tensor) or not isinstance(passed, Tensor):
        return False
    return torch.equal(passed, ones) and not torch.equal(trained, ones)


class _Outputs(Replay):
    """A print of what each module's piece of the oracle ends in."""

    def __init__(self, analysis: Analysis, oracle: GraphModule, probe: Probe) -> None:
        super().__init__(oracle, probe.state)
        once = _called(analysis)
        last: dict[str, Node] = {}
        for node, twin in zip(analysis.graph_module.graph.nodes, oracle.graph.nodes, strict=True):
            last.update(dict.fromkeys(once.intersection(modules_of(node)), twin))
        self.ends: dict[Node, list[str]] = {}
        for name, node in last.items():
            self.ends.setdefault(node, []).append(name)
        self.prints: dict[str, Print] = {}
        self.run(probe.inputs[0])

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.prints.update({name: _print(value) for name in self.ends.get(n, [])})
        return value


def _print(tensor: Tensor) -> Print:
    values = tensor.detach().double().flatten()
    weights = torch.linspace(1, 2, len(values), dtype=torch.float64, device=values.device)
    return tensor.shape, float((values.square() * weights).sum().sqrt())


def _agree(one: Print, other: Print) -> bool:
    return one[0] == other[0] and abs(one[1] - other[1]) <= _SAME * other[1]


def _innermost(module: nn.Module, failure: BaseException) -> str | None:
    """The innermost submodule whose code was running when `failure` was raised."""
    names = {id(submodule): name for name, submodule in module.named_modules()}
    found = None
    traceback = failure.__traceback__
    while traceback is not None:
        running = traceback.tb_frame.f_locals.get("self")
        found = names.get(id(running), found)
        traceback = traceback.tb_next
    return found


def _called(analysis: Analysis) -> set[str]:
    """The modules that run once, in the graph."""
    names = {name for node in analysis.graph_module.graph.nodes for name in modules_of(node)}
    several = {name.partition("@")[0] for name in names if "@" in name}
    return {name for name in names if name and "@" not in name} - several


def _is_layer(module: nn.Module) -> bool:
    return is_torchs(module) and not list(module.children())


def _is_within(name: str, others: Collection[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _num_values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
