"""Blocks that do nothing go, and no others: found by structure, exactly removed, for good."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.capture import analyze, capture
from slimdown.core import Context
from slimdown.errors import BadInput, Interrupted, RecipeError
from slimdown.prune import Prune
from slimdown.prune.budget.cost import mac_cost
from slimdown.prune.depth import blocks
from slimdown.prune.depth.blocks import remove_blocks
from slimdown.prune.depth.branches import Bypassed, bypass, find_branches
from slimdown.prune.verification import verify
from slimdown.saved import load, save

NEXT_TO_NOTHING = 1e-3


def make_task(*shape: int, num_images: int = 12) -> Any:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(num_images, *shape, generator=generator)
    return SimpleNamespace(
        example_input=images[:1], calibration_batches=lambda: list(images.split(8))
    )


class Basic(nn.Module):
    """The block of a ResNet: written in place, and a ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class TinyResNet(nn.Module):
    def __init__(self, num_blocks: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(*(Basic(16) for _ in range(num_blocks)))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        qkv = self.qkv(x).view(n, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """The block of a ViT; its mask is what a plain identity is not called with."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, 2)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    def __init__(self, depth: int = 4, dim: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(8, dim, 2, 2)
        self.layers = nn.ModuleList(Layer(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, None)
        return self.head(x.mean(1))


class TinyC2f(nn.Module):
    """YOLO's: every bottleneck's output is kept for a concatenation."""

    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cv1, self.cv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + F.silu(self.cv2(F.silu(self.cv1(x))))

    def __init__(self, num_bottlenecks: int = 3) -> None:
        super().__init__()
        self.cv1 = nn.Conv2d(8, 16, 1)
        self.m = nn.ModuleList(self.Bottleneck() for _ in range(num_bottlenecks))
        self.cv2 = nn.Conv2d(16 + 8 * num_bottlenecks, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.head(F.silu(self.cv2(torch.cat(y, 1))).mean((2, 3)))


class Parallel(nn.Module):
    """Attention and MLP side by side, both with the same norm, written in the root's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        y = self.norm(x)
        x = x + torch.tanh(self.a(y)) + self.b(y)
        return self.head(x + self.c(x))


NETS: dict[str, tuple[type[nn.Module], list[str], list[str]]] = {
    "resnet": (TinyResNet, ["blocks.1.bn2", "blocks.3.bn2"], ["blocks.1", "blocks.3"]),
    "vit": (
        TinyViT,
        ["layers.1.attn.proj", "layers.1.mlp.2", "layers.2.attn.proj", "layers.2.mlp.2"],
        ["layers.1", "layers.2"],
    ),
    "vit branches": (
        TinyViT,
        ["layers.0.attn.proj", "layers.2.mlp.2"],
        ["layers.0/1", "layers.2/2"],
    ),
    "c2f": (TinyC2f, ["m.0.cv2", "m.2.cv2"], ["m.0", "m.2"]),
    "parallel": (Parallel, ["b", "c"], ["/2", "/3"]),
}


def make(name: str) -> nn.Module:
    """A network with two blocks, or branches, that do next to nothing."""
    torch.manual_seed(1)
    kind, idle, _ = NETS[name]
    model = kind()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.1)
        for layer in idle:
            for parameter in model.get_submodule(layer).parameters():
                parameter.mul_(NEXT_TO_NOTHING)
    return model.eval()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def num_bytes(model: nn.Module) -> int:
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", NETS)
def test_two_idle_blocks_go_and_no_others(name: str) -> None:
    model, task = make(name), make_task(8, 8, 8)
    shallow = remove_blocks(model, task, max_error=0.05)
    assert sorted(shallow.facts["removed"]) == NETS[name][2]
    assert shallow.facts["delivery"] == "in_place"
    assert 0 < shallow.facts["output_error"] < 0.05
    assert type(shallow.module) is type(model)
    x = torch.randn(3, 8, 8, 8)
    with torch.no_grad():
        before, after = model(x), shallow.module(x)
    assert float((after - before).norm() / before.norm()) < 0.05
    gone = model.state_dict().keys() - shallow.module.state_dict().keys()
    assert gone
    assert shallow.module.state_dict().keys() < model.state_dict().keys()
    assert shallow.after.count_parameters({}) == count(shallow.module) < count(model)
    assert shallow.after.count_macs({}) < shallow.before.count_macs({})


@pytest.mark.parametrize("name", NETS)
def test_the_result_is_the_original_with_the_blocks_bypassed(name: str) -> None:
    """With hooks on the user's own modules: no code of slimdown's is in the reference."""
    model, task = make(name), make_task(8, 8, 8)
    for parameter in model.parameters():  # revived, so that bypassing is seen
        if float(parameter.detach().abs().max()) < 0.1:
            nn.init.normal_(parameter, std=0.5)
    structure = remove_blocks(make(name), task, max_error=0.05).structure
    plan = {"delivery": "in_place", "parameters": {}, "attributes": {}, "depth": structure}
    shallow = Prune(macs=0.5).rebuild(model, plan, task.example_input)
    x = torch.randn(3, 8, 8, 8)
    whole = model(x)
    for removed in NETS[name][2]:
        module, _, index = removed.partition("/")
        if not index:
            hook = lambda module, args, output: args[0]  # noqa: E731
            model.get_submodule(module).register_forward_hook(hook)
        else:
            last = {"layers.0/1": "layers.0.attn", "layers.2/2": "layers.2.mlp"}
            last |= {"/2": "b", "/3": "c"}
            hook = lambda module, args, output: torch.zeros_like(output)  # noqa: E731
            model.get_submodule(last[removed]).register_forward_hook(hook)
    bypassed = model(x)
    assert not torch.allclose(bypassed, whole, atol=1e-3)
    torch.testing.assert_close(shallow(x), bypassed)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_blocks_then_channels_within_one_budget(name: str, tmp_path: Path) -> None:
    model, task = make(name), make_task(8, 8, 8)
    stage = Prune(macs=0.4, depth=0.05, round_to=1, importance="l2", compensate=False)
    result = stage(model, task)
    before, after = result.facts["macs"]
    assert before == analyze(capture(model, task.example_input)).count_macs({})
    assert 0.3 < after / before <= 0.4
    assert sorted(result.facts["depth"]["removed"]) == NETS[name][2]
    assert result.facts["parameters"] == [count(model), count(result.model)]
    assert result.facts["size"] == [num_bytes(model), num_bytes(result.model)]
    assert json.loads(json.dumps(result.facts)) == result.facts
    rebuilt = stage.rebuild(
        make(name), json.loads(json.dumps(result.structure)), task.example_input
    )
    rebuilt.load_state_dict(result.model.state_dict(), strict=True)
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(rebuilt(x), result.model(x))
    assert verify(model, result, task.example_input).delivered_error < 1e-5
    save(result, tmp_path)
    assert torch.equal(load(tmp_path, model=make(name))(x), result.model(x))


def test_blocks_go_only_as_far_as_the_budget_asks() -> None:
    model, task = make("resnet"), make_task(8, 8, 8)
    result = Prune(macs=0.85, depth=0.05, importance="l2")(model, task)
    assert len(result.facts["depth"]["removed"]) == 1
    assert all(before == after for before, after in result.facts["widths"].values())
    untouched = Prune(macs=1.0, depth=0.05, importance="l2")(model, task)
    assert len(untouched.facts["depth"]["removed"]) == 2  # nothing to stop at
    assert all(before == after for before, after in untouched.facts["widths"].values())


def test_the_allowed_change_is_kept_to() -> None:
    model, task = make("resnet"), make_task(8, 8, 8)
    none = remove_blocks(model, task, max_error=1e-9)
    assert none.structure == {}
    assert none.facts["removed"] == []
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(none.module(x), model(x))
    for max_error in (0.5, 2.0):
        shallow = remove_blocks(model, task, max_error=max_error)
        images = torch.cat(task.calibration_batches())
        with torch.no_grad():
            whole, left = model(images), shallow.module(images)
        error = float((left - whole).norm() / (whole - whole.mean(0)).norm())
        assert error == pytest.approx(shallow.facts["output_error"], rel=1e-4)
        assert error <= max_error


def test_each_choice_is_the_best_given_those_before() -> None:
    """Lazy greedy choice against the plain one."""
    model, task = make("vit"), make_task(8, 8, 8)
    graph_module = capture(model, task.example_input)
    images = torch.cat(task.calibration_batches())
    whole = Bypassed(graph_module, ()).run(images)

    def error(branches: list[Any]) -> float:
        change = Bypassed(graph_module, branches).run(images) - whole
        return float(change.double().norm() / (whole - whole.mean(0)).double().norm())

    left, chosen = list(find_branches(graph_module)), []
    while left:
        best = min(left, key=lambda branch: error([*chosen, branch]))
        if error([*chosen, best]) > 0.3:
            break
        chosen.append(best)
        left.remove(best)
    removed = set()
    for name in remove_blocks(model, task, max_error=0.3).facts["removed"]:
        removed |= {name} if "/" in name else {f"{name}/1", f"{name}/2"}
    assert removed == {branch.name for branch in chosen}


def test_globs_protect_blocks() -> None:
    model, task = make("resnet"), make_task(8, 8, 8)
    spared = remove_blocks(model, task, max_error=0.05, exclude=("blocks.1.conv2",))
    assert spared.facts["removed"] == ["blocks.3"]
    only = remove_blocks(model, task, max_error=0.05, include=("blocks.1*",))
    assert only.facts["removed"] == ["blocks.1"]


def test_globs_that_match_nothing_are_refused() -> None:
    for option in ("include", "exclude"):
        settings: dict[str, Any] = {option: ("blocks.1*", "blocks.9*")}
        with pytest.raises(RecipeError, match=rf"prune\.{option}: 'blocks\.9\*' matches no layer"):
            remove_blocks(make("resnet"), make_task(8, 8, 8), max_error=0.05, **settings)


def test_globs_may_name_blocks_that_went() -> None:
    stage = Prune(macs=0.6, depth=0.05, round_to=1, importance="l2", include=("blocks.*",))
    model, task = make("resnet"), make_task(8, 8, 8)
    settings: dict[str, Any] = {"include": ("blocks.3.conv1", "blocks.*"), "exclude": ("stem.*",)}
    result = replace(stage, **settings)(model, task)
    assert "blocks.3" in result.facts["depth"]["removed"]
    assert result.structure == stage(model, task).structure


def test_costs_are_counted_only_where_something_is_to_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    analyzed = []
    monkeypatch.setattr(blocks, "analyze", lambda graph: analyzed.append(graph) or analyze(graph))
    remove_blocks(make("resnet"), make_task(8, 8, 8), max_error=0.05)
    assert len(analyzed) == 2  # what came in and what is left
    analyzed.clear()
    shallow = remove_blocks(
        make("resnet"), make_task(8, 8, 8), max_error=0.05, fraction=0.1, count=mac_cost
    )
    assert len(analyzed) == 3 + len(shallow.facts["removed"]) == 5


def test_captured_graphs_lose_their_blocks_as_graphs() -> None:
    model, task = make("vit"), make_task(8, 8, 8)
    graph_module = capture(model, task.example_input)
    stage = Prune(macs=0.5, depth=0.05, round_to=1, importance="l2", compensate=False)
    result = stage(graph_module, task)
    assert result.facts["depth"]["delivery"] == "graph"
    assert len(result.facts["depth"]["removed"]) == 4
    rebuilt = stage.rebuild(graph_module, result.structure, task.example_input)
    rebuilt.load_state_dict(result.model.state_dict(), strict=True)
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(rebuilt(x), result.model(x))


def test_a_block_that_its_modules_cannot_lose_goes_from_the_graph() -> None:
    class Odd(nn.Module):
        """A branch that is no module's: the layer is only where its weight is kept."""

        def __init__(self) -> None:
            super().__init__()
            self.idle, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean((2, 3))
            return self.head(x + 1e-3 * F.linear(x, self.idle.weight))

    model, task = Odd().eval(), make_task(8, 8, 8)
    result = Prune(parameters=0.5, depth=0.05, importance="l2")(model, task)
    assert result.facts["depth"]["delivery"] == result.facts["delivery"] == "graph"
    assert result.model.state_dict().keys() == {"head.weight", "head.bias"}
    rebuilt = Prune(parameters=0.5).rebuild(model, result.structure, task.example_input)
    rebuilt.load_state_dict(result.model.state_dict())
    x = torch.randn(3, 8, 8, 8)
    torch.testing.assert_close(rebuilt(x), model.head(x.mean((2, 3))))


class WithWeights(nn.Module):
    """An attention that returns a pair, and a dropout after it, as in torchvision's ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + self.dropout(y)
        return self.head(x.mean(1))


@pytest.mark.parametrize("has_dropout", [True, False])
def test_an_attention_that_returns_a_pair_goes_from_the_module(has_dropout: bool) -> None:
    model, task = WithWeights().eval(), make_task(8, 8, 8)
    if not has_dropout:
        model.dropout = nn.Identity()
    with torch.no_grad():
        for parameter in model.attention.out_proj.parameters():
            parameter.mul_(NEXT_TO_NOTHING)
    shallow = remove_blocks(model, task, max_error=0.05)
    assert shallow.facts["delivery"] == "in_place"
    assert shallow.module.state_dict().keys() == {"head.weight", "head.bias"}
    for batch_size in (1, 2, 3):
        x = torch.randn(batch_size, 8, 8, 8)
        expected = model.head(x.flatten(2).mean(2))
        torch.testing.assert_close(shallow.module(x), expected)


def test_no_branch_is_seen_where_there_is_none(tiny_net: nn.Module) -> None:
    """A block with a convolution on its shortcut changes what passes by: it must stay."""
    assert find_branches(capture(tiny_net, torch.randn(1, 3, 16, 16))) == ()

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.position = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean((2, 3)) + self.position
            x = self.a(x) + self.b(x)
            x = x + x.relu()  # nothing to gain
            return torch.add(x, self.a(x), alpha=2)

    assert find_branches(capture(Sums(), torch.randn(1, 8, 8, 8))) == ()


def test_bypassing_in_place_sums_leaves_others_values_alone() -> None:
    """The ReLU after a removed sum must not write into the shortcut, which is also an output."""

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x)
            y = self.conv(x)
            y += x
            return x, torch.relu_(y)

    graph_module = capture(Features(), torch.randn(1, 8, 8, 8))
    branches = find_branches(graph_module)
    assert len(branches) == 1
    shallow = bypass(graph_module, branches)
    x = torch.randn(2, 8, 8, 8)
    first = graph_module(x)[0]
    for network in (shallow, Bypassed(graph_module, branches).run):
        kept, rectified = network(x)
        assert torch.equal(kept, first)
        assert torch.equal(rectified, first.relu())
    assert not any("conv" in name for name, _ in shallow.named_parameters())
    assert mac_cost(analyze(shallow))({}) * 2 == mac_cost(analyze(graph_module))({})


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("depth", [-0.1, float("inf"), float("nan")])
def test_wrong_settings_are_refused(depth: float) -> None:
    with pytest.raises(RecipeError, match=r"prune\.depth is the change of the outputs"):
        Prune(macs=0.5, depth=depth)


def test_images_are_needed_and_must_differ() -> None:
    model = make("resnet")
    with pytest.raises(BadInput, match="the task has 0: give the data"):
        Prune(macs=0.5, depth=0.1)(model, _empty())
    same = _empty()
    same.calibration_batches = lambda: [torch.ones(4, 8, 8, 8)]
    with pytest.raises(BadInput, match="the same output for all calibration images"):
        Prune(macs=0.5, depth=0.1)(model, same)


def _empty() -> Any:
    return SimpleNamespace(example_input=torch.zeros(1, 8, 8, 8), calibration_batches=list)


def test_outputs_and_weights_that_are_no_numbers_are_refused() -> None:
    task = make_task(8, 8, 8)
    broken = make("resnet")
    with torch.no_grad():
        next(broken.parameters())[0] = torch.nan
    name, _ = next(broken.named_parameters())
    with pytest.raises(BadInput, match=f"{name} of this model holds NaN"):
        Prune(macs=0.5, depth=0.1)(broken, task)
    bad = _empty()
    bad.calibration_batches = lambda: [torch.full((4, 8, 8, 8), torch.inf)]
    with pytest.raises(BadInput, match="output 0 of this model"):
        Prune(macs=0.5, depth=0.1)(make("resnet"), bad)


def test_another_models_plan_is_refused() -> None:
    plan = {"delivery": "in_place", "parameters": {}, "attributes": {}}
    for depth in ({"replaced": {"blocks.9": "identity"}}, {"branches": ["blocks.9"]}, {"x": 1}):
        with pytest.raises(BadInput, match="removes blocks that this model lacks"):
            Prune(macs=0.5).rebuild(
                make("resnet"), {**plan, "depth": depth}, torch.randn(1, 8, 8, 8)
            )


def test_it_stops_when_asked_to() -> None:
    with pytest.raises(Interrupted):
        Prune(macs=0.5, depth=0.1)(
            make("resnet"), make_task(8, 8, 8), Context(stop_requested=lambda: True)
        )


# ------------------------------------------------------------------------------ other peoples' nets


def test_latency_counts_from_the_model_that_came_in(fake_clock: Any) -> None:
    """Two of four layers go first; of what must be left, channels bring the rest."""

    def milliseconds(operation: Any) -> float:
        return float(sum(torch.Size(shape).numel() for shape in operation.shapes))

    model, task = make("vit"), make_task(8, 8, 8)
    clock = fake_clock(milliseconds, round_to=1)
    stage = Prune(latency=0.4, target="fake", depth=0.05, importance="l2", compensate=False)
    result = stage(model, task, Context(find_clock=lambda name: clock))
    networks = [clock.deploy(each, task.example_input) for each in (model, result.model)]
    before, after = clock.time_networks(networks, task.example_input)
    assert after / before == pytest.approx(0.4, rel=0.1)
    assert sorted(result.facts["depth"]["removed"]) == ["layers.1", "layers.2"]


def test_torchvisions_resnet() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=5).eval()
    revive_(model, idle=["layer2.1.bn2", "layer4.1.bn2"])
    shallow = remove_blocks(model, make_task(3, 32, 32), max_error=0.02)
    assert sorted(shallow.facts["removed"]) == ["layer2.1", "layer4.1"]
    assert isinstance(shallow.module.layer2[1], nn.Identity)
    assert not any(key.startswith("layer4.1") for key in shallow.module.state_dict())


@pytest.mark.timm
def test_timms_vit() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32, num_classes=5).eval()
    idle = [f"blocks.{index}.{layer}" for index in (1, 2) for layer in ("attn.proj", "mlp.fc2")]
    revive_(model, idle=idle)
    shallow = remove_blocks(model, make_task(3, 32, 32), max_error=0.02)
    assert sorted(shallow.facts["removed"]) == ["blocks.1", "blocks.2"]
    assert isinstance(shallow.module.blocks[1], nn.Identity)


def revive_(model: nn.Module, *, idle: list[str]) -> None:
    """Norms that have seen data, and some layers that say next to nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        for layer in idle:
            for parameter in model.get_submodule(layer).parameters():
                parameter.mul_(NEXT_TO_NOTHING)
