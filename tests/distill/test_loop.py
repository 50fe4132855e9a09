"""The training loop: what it minimizes, resumes to the same bits, refuses, and leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from slimdown.capture import capture
from slimdown.core import Batch, Context, Score
from slimdown.distill import Trained, TrainSettings, loop, train
from slimdown.distill.average import tensors_of
from slimdown.errors import BadInput, Diverged, Interrupted

QUICK = TrainSettings(epochs=2, learning_rate=0.01)


def _equal(first: nn.Module, second: nn.Module) -> bool:
    other = tensors_of(second)
    return all(torch.equal(tensor, other[name]) for name, tensor in tensors_of(first).items())


def _perturbed(model: nn.Module, noise: float = 0.05) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


# ------------------------------------------------------------------------------ what it computes


def test_alpha_1_is_plain_training(tiny_net: nn.Module, toy_task: Any) -> None:
    settings = TrainSettings(
        epochs=1,
        alpha=1.0,
        optimizer="sgd",
        learning_rate=0.1,
        warmup=0,
        clip_norm=None,
        augment="none",
    )
    toy_task.num_batches = 1
    toy_task.__post_init__()
    trained = train(tiny_net, toy_task, settings).model

    plain = copy.deepcopy(tiny_net).train()
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in plain.parameters() if p.ndim <= 1]},
        ],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    F.cross_entropy(plain(toy_task.images), toy_task.targets).backward()
    optimizer.step()
    for name, tensor in tensors_of(trained).items():  # the batch is shuffled: equal up to rounding
        torch.testing.assert_close(tensor, tensors_of(plain)[name], atol=1e-5, rtol=1e-4)


def test_learns_from_the_teacher_without_labels(tiny_net: nn.Module, unlabeled_task: Any) -> None:
    student = _perturbed(tiny_net)
    settings = TrainSettings(epochs=12, augment="none", ema=0.9)
    history = train(student, unlabeled_task, settings, teacher=tiny_net).history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["loss"] == history[-1]["soft"]
    assert history[-1]["hard"] is None


def test_terms_are_recorded(tiny_net: nn.Module, toy_task: Any) -> None:
    settings = TrainSettings(epochs=2, alpha=0.25, learning_rate=0.01)
    for record in train(tiny_net, toy_task, settings, teacher=tiny_net).history:
        hard, soft = record["hard"], record["soft"]
        assert hard is not None and soft is not None  # noqa: PT018
        assert record["loss"] == pytest.approx(0.25 * hard + 0.75 * soft, rel=1e-5)


@pytest.mark.parametrize("keeps_first", [True, False])
def test_the_average_is_the_result(
    tiny_net: nn.Module, toy_task: Any, monkeypatch: pytest.MonkeyPatch, keeps_first: bool
) -> None:
    student, averaging = _perturbed(tiny_net), TrainSettings(epochs=2, learning_rate=0.01, ema=0.9)
    last = train(student, toy_task, QUICK, teacher=tiny_net).model
    monkeypatch.setattr(loop, "decay_at", lambda update, decay: 1.0 if keeps_first else 0.0)
    averaged = train(student, toy_task, averaging, teacher=tiny_net).model
    expected = dict((student if keeps_first else last).named_parameters())
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=0)


def test_clipping_limits_the_step(tiny_net: nn.Module, toy_task: Any) -> None:
    settings = TrainSettings(
        epochs=1,
        alpha=1.0,
        optimizer="sgd",
        learning_rate=1.0,
        momentum=0,
        weight_decay=0,
        clip_norm=1e-3,
    )
    toy_task.num_batches = 1
    toy_task.__post_init__()
    trained = dict(train(tiny_net, toy_task, settings).model.named_parameters())
    moved = [p.detach() - trained[name].detach() for name, p in tiny_net.named_parameters()]
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_mixup_and_bf16_train(tiny_net: nn.Module, toy_task: Any, optimizer: Any) -> None:
    settings = TrainSettings(
        epochs=3, alpha=0.5, mixup=1.0, amp="bf16", optimizer=optimizer, learning_rate=3e-3
    )
    trained = train(_perturbed(tiny_net), toy_task, settings, teacher=tiny_net)
    assert all(p.dtype == torch.float32 for p in trained.model.parameters())
    assert np.isfinite([record["loss"] for record in trained.history]).all()


def test_a_captured_graph_is_trained(tiny_net: nn.Module, toy_task: Any) -> None:
    graph = capture(_perturbed(tiny_net), toy_task.example_input)
    settings = TrainSettings(epochs=6, augment="none", learning_rate=0.02)
    trained = train(graph, toy_task, settings, teacher=tiny_net)
    assert trained.history[-1]["loss"] < 0.7 * trained.history[0]["loss"]
    with torch.no_grad():
        rebuilt = copy.deepcopy(graph)  # as the pipeline does
        rebuilt.load_state_dict(trained.model.state_dict())
        assert torch.equal(rebuilt(toy_task.images), trained.model(toy_task.images))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_captured_graph_is_trained_as_its_model(
    tiny_net: nn.Module, toy_task: Any, optimizer: Any
) -> None:
    settings = TrainSettings(epochs=2, optimizer=optimizer, learning_rate=1e-3)
    student = _perturbed(tiny_net)
    graph = capture(student, toy_task.example_input)
    expected = tensors_of(train(student, toy_task, settings, teacher=tiny_net).model)
    trained = tensors_of(train(graph, toy_task, settings, teacher=tiny_net).model)
    assert not torch.equal(trained["bn.running_mean"], student.get_buffer("bn.running_mean"))
    for name, tensor in trained.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)


class FakeQuantized(nn.Module):
    """A network whose head weights and inputs go through 8-bit fake quantization."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", torch.tensor(0.05))

    def forward(self, x: Tensor) -> Tensor:
        zero = torch.tensor(0, dtype=torch.int32)
        return self.net(torch.fake_quantize_per_tensor_affine(x, self.scale, zero, -128, 127))


def test_a_fake_quantized_student_is_trained(tiny_net: nn.Module, toy_task: Any) -> None:
    student = FakeQuantized(_perturbed(tiny_net))
    settings = TrainSettings(epochs=8, augment="none", learning_rate=0.02)
    history = train(student, toy_task, settings, teacher=tiny_net).history
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


def test_a_data_loader_gives_batches_too(tiny_net: nn.Module, toy_task: Any) -> None:
    pairs = TensorDataset(toy_task.images, toy_task.targets)
    toy_task.train_batches = lambda epoch: DataLoader(pairs, batch_size=8, shuffle=True)
    labeled = train(tiny_net, toy_task, TrainSettings(epochs=1, alpha=0.5), teacher=tiny_net)
    toy_task.train_batches = lambda epoch: toy_task.images.split(8)
    unlabeled = train(tiny_net, toy_task, TrainSettings(epochs=1), teacher=tiny_net)
    assert labeled.num_steps == unlabeled.num_steps == 4


# ------------------------------------------------------------------------------ what it leaves


def test_both_models_and_the_generators_are_left_alone(tiny_net: nn.Module, toy_task: Any) -> None:
    student, teacher = _perturbed(tiny_net).eval(), _perturbed(tiny_net).train()
    before = copy.deepcopy((student, teacher))
    state = torch.get_rng_state()
    result = train(student, toy_task, QUICK, teacher=teacher).model
    assert _equal(student, before[0])
    assert _equal(teacher, before[1])
    assert (student.training, teacher.training, result.training) == (False, True, False)
    assert all(p.grad is None for model in (student, teacher, result) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not _equal(student, result)


def test_equal_seeds_give_equal_bits(tiny_net: nn.Module, toy_task: Any) -> None:
    def once(seed: int) -> nn.Module:
        torch.rand(seed + 1)  # whatever was drawn before does not matter
        return train(tiny_net, toy_task, QUICK, context=Context(original=teacher, seed=seed)).model

    teacher = _perturbed(tiny_net)
    assert _equal(once(1), once(1))
    assert not _equal(once(1), once(2))


# ------------------------------------------------------------------------------ stop and resume


class Dropping(nn.Module):
    """A network that draws random numbers in training, and has a buffer outside its state dict."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        calls = self.get_buffer("calls")
        if self.training:
            calls.add_(1)
        return self.net(F.dropout(x, 0.2, self.training)) * (1 + 0.01 * calls)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_anywhere_gives_the_same_bits(
    tiny_net: nn.Module,
    toy_task: Any,
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: Any,
) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    student, teacher = Dropping(_perturbed(tiny_net)), tiny_net
    settings = TrainSettings(
        epochs=2, alpha=0.5, mixup=0.4, ema=0.9, optimizer=optimizer, learning_rate=0.01
    )
    whole = recorder()
    expected = train(student, toy_task, settings, context=whole.context(teacher))
    assert len(whole.saved) == 2 * (toy_task.num_batches + 1)
    assert expected.num_steps == 2 * toy_task.num_batches
    for checkpoint in whole.saved:
        context = recorder().context(teacher, resume=checkpoint)
        _assert_same(train(student, toy_task, settings, context=context), expected)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6, 8])
def test_a_requested_stop_saves_and_raises(
    tiny_net: nn.Module, toy_task: Any, recorder: Any, stop_after: int
) -> None:
    student = _perturbed(tiny_net)
    expected = train(student, toy_task, QUICK, context=recorder().context(tiny_net))
    stopped = recorder(stop_after=stop_after)
    with pytest.raises(Interrupted, match=r"stopped in epoch \d of 2"):
        train(student, toy_task, QUICK, context=stopped.context(tiny_net))
    context = recorder().context(tiny_net, resume=stopped.saved[-1])
    _assert_same(train(student, toy_task, QUICK, context=context), expected)


def test_stopping_after_every_step_still_arrives(
    tiny_net: nn.Module, toy_task: Any, recorder: Any
) -> None:
    student, checkpoint = _perturbed(tiny_net), None
    expected = train(student, toy_task, QUICK, context=recorder().context(tiny_net))
    for _ in range(expected.num_steps):
        stopped = recorder(stop_after=1)
        with pytest.raises(Interrupted):
            train(student, toy_task, QUICK, context=stopped.context(tiny_net, resume=checkpoint))
        checkpoint = stopped.saved[-1]
    context = recorder().context(tiny_net, resume=checkpoint)
    _assert_same(train(student, toy_task, QUICK, context=context), expected)


def _assert_same(trained: Trained, expected: Trained) -> None:
    assert _equal(trained.model, expected.model)
    assert trained.history == expected.history
    assert trained.num_steps == expected.num_steps


def test_batches_drawn_lazily_resume_too(tiny_net: nn.Module, toy_task: Any, recorder: Any) -> None:
    class Lazy:
        """Draws each batch from the global generator only when it is asked for."""

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Any:
            for _ in range(4):
                chosen = torch.randint(len(toy_task.images), (8,))
                yield [toy_task.images[chosen], toy_task.targets[chosen]]

    toy_task.train_batches = lambda epoch: Lazy()
    student = nn.Sequential(nn.Dropout(0.1), _perturbed(tiny_net))
    expected = train(student, toy_task, QUICK, context=recorder().context(tiny_net))
    stopped = recorder(stop_after=6)
    with pytest.raises(Interrupted):
        train(student, toy_task, QUICK, context=stopped.context(tiny_net))
    context = recorder().context(tiny_net, resume=stopped.saved[-1])
    _assert_same(train(student, toy_task, QUICK, context=context), expected)


# ------------------------------------------------------------------------------ what it shows


def test_progress_counts_steps_and_names_figures(
    tiny_net: nn.Module, toy_task: Any, recorder: Any
) -> None:
    toy_task.validate = toy_task.score
    watching = recorder()
    settings = TrainSettings(epochs=2, alpha=0.5, learning_rate=0.01)
    trained = train(tiny_net, toy_task, settings, context=watching.context(tiny_net))
    assert [(p.done, p.total) for p in watching.shown] == [(i, 8) for i in range(1, 9)]
    assert set(watching.shown[-1].figures) == {
        "epoch",
        "loss",
        "hard",
        "soft",
        "learning_rate",
        "images_per_second",
        "validation",
    }
    final: Score = toy_task.score(trained.model)
    assert trained.history[-1]["validation"] == final.value


# ------------------------------------------------------------------------------ what it refuses


def test_labels_that_are_needed_must_be_there(tiny_net: nn.Module, unlabeled_task: Any) -> None:
    with pytest.raises(BadInput, match=r"set distill\.alpha to 0"):
        train(tiny_net, unlabeled_task, TrainSettings(alpha=0.5), teacher=tiny_net)


def test_a_teacher_that_is_needed_must_be_there(tiny_net: nn.Module, toy_task: Any) -> None:
    with pytest.raises(BadInput, match="needs a teacher"):
        train(tiny_net, toy_task, QUICK)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda x: x.mean((2, 3))[:, :3].repeat(1, 2), "4 classes and the teacher 6"),
        (lambda x: x, r"the teacher gives \(8, 3, 16, 16\)"),
        (lambda x: [x], "the teacher gives list"),
    ],
)
def test_outputs_must_be_comparable(
    tiny_net: nn.Module, toy_task: Any, teacher: Callable[[Tensor], Any], message: str
) -> None:
    class Teacher(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return teacher(x)

    with pytest.raises(BadInput, match=message):
        train(tiny_net, toy_task, QUICK, teacher=Teacher())


def test_a_loss_without_a_gradient_is_refused(tiny_net: nn.Module, toy_task: Any) -> None:
    class Detached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(BadInput, match="detaches"):
        train(Detached(tiny_net), toy_task, QUICK, teacher=tiny_net)


def test_an_empty_epoch_is_refused(tiny_net: nn.Module, toy_task: Any) -> None:
    toy_task.train_batches = lambda epoch: []
    with pytest.raises(BadInput, match="no training batch in epoch 1"):
        train(tiny_net, toy_task, QUICK, teacher=tiny_net)


def test_mixup_of_labels_needs_a_tensor(tiny_net: nn.Module, toy_task: Any) -> None:
    toy_task.train_batches = lambda epoch: [Batch(toy_task.images, list(toy_task.targets))]
    toy_task.loss = lambda outputs, batch: F.cross_entropy(outputs, torch.stack(batch.targets))
    with pytest.raises(BadInput, match="got list"):
        train(tiny_net, toy_task, TrainSettings(alpha=1.0, mixup=1.0))


# ------------------------------------------------------------------------------ NaN and infinity


def test_a_nan_loss_keeps_the_last_good_checkpoint(
    tiny_net: nn.Module, toy_task: Any, recorder: Any
) -> None:
    calls = iter(range(100))
    toy_task.loss = lambda outputs, batch: (
        F.cross_entropy(outputs, batch.targets) * (float("nan") if next(calls) == 6 else 1.0)
    )
    watching = recorder()
    settings = TrainSettings(epochs=3, alpha=1.0, learning_rate=0.01)
    with pytest.raises(Diverged, match=r"epoch 2 of 3, step 3, at learning rate .*Lower"):
        train(tiny_net, toy_task, settings, context=watching.context())
    assert len(watching.saved) == 1  # that of epoch 1
    resumed = train(
        tiny_net, toy_task, settings, context=recorder().context(resume=watching.saved[-1])
    )
    assert all(bool(p.isfinite().all()) for p in resumed.model.parameters())


def test_a_learning_rate_that_explodes_is_named(
    tiny_net: nn.Module, toy_task: Any, recorder: Any
) -> None:
    watching = recorder()
    settings = TrainSettings(epochs=3, learning_rate=1e30, warmup=0, clip_norm=None)
    with pytest.raises(Diverged, match=r"Lower distill\.learning_rate \(its highest is 1e\+30\)"):
        train(_perturbed(tiny_net), toy_task, settings, context=watching.context(tiny_net))
    assert watching.saved == []


def test_weights_that_overflow_are_not_saved(
    tiny_net: nn.Module, toy_task: Any, recorder: Any
) -> None:
    toy_task.num_batches = 1  # one step an epoch: the gradient is finite, the step is not
    toy_task.__post_init__()
    watching = recorder()
    settings = TrainSettings(
        epochs=1, learning_rate=1e38, warmup=0, weight_decay=1e3, optimizer="sgd"
    )
    with pytest.raises(Diverged):
        train(_perturbed(tiny_net), toy_task, settings, context=watching.context(tiny_net))
    assert watching.saved == []


def test_bad_images_and_teachers_are_told_apart(tiny_net: nn.Module, toy_task: Any) -> None:
    teacher = copy.deepcopy(tiny_net)
    teacher.get_parameter("head.bias").data[0] = float("nan")
    with pytest.raises(Diverged, match="teacher's outputs"):
        train(tiny_net, toy_task, QUICK, teacher=teacher)
    toy_task.images[3, 0, 0, 0] = float("inf")
    with pytest.raises(Diverged, match="images of epoch 1"):
        train(tiny_net, toy_task, QUICK, teacher=tiny_net)
