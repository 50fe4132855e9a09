"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimdown.load.onnx.call import Call, torch_type
from slimdown.load.onnx.numbers import Numbers, Value, combine, divide


def _of_pairs(function: Callable[[Any, Any], Any], of_numbers: Any = None) -> Any:
    """An operator on two or more operands, each a tensor or a number."""

    def run(call: Call) -> Value:
        if call.are_numbers():
            operands = [each for each in call.inputs if isinstance(each, Numbers)]
            return reduce(lambda a, b: combine(of_numbers or function, a, b), operands)
        return reduce(function, [call.operand(index) for index in range(len(call.inputs))])  # type: ignore[no-any-return]

    return run


def _of_one(function: Callable[[Tensor], Tensor], of_number: Any = None) -> Any:
    def run(call: Call) -> Value:
        value = call.value(0)
        if isinstance(value, Numbers) and of_number is not None:
            return combine(of_number, value)
        return function(call.tensor(0))

    return run


def _divide(a: Any, b: Any) -> Any:
    kinds = [each for each in (a, b) if isinstance(each, Tensor)]
    if kinds[0].is_floating_point():
        return a / b
    return torch.div(torch.as_tensor(a), b, rounding_mode="trunc")


def _min(a: Any, b: Any) -> Any:
    tensor, other = (a, b) if isinstance(a, Tensor) else (b, a)
    return torch.minimum(tensor, other) if isinstance(other, Tensor) else tensor.clamp(max=other)


def _max(a: Any, b: Any) -> Any:
    tensor, other = (a, b) if isinstance(a, Tensor) else (b, a)
    return torch.maximum(tensor, other) if isinstance(other, Tensor) else tensor.clamp(min=other)


def mean(call: Call) -> Value:
    total = [call.operand(index) for index in range(len(call.inputs))]
    return reduce(operator.add, total) / len(total)  # type: ignore[no-any-return]


def clip(call: Call) -> Value:
    low, high = (call.operand(i) if call.has(i) else None for i in (1, 2))
    x = call.tensor(0)
    if (low, high) == (0.0, 6.0):
        return F.relu6(x)  # what runtimes and quantizers know it by
    return torch.clamp(x, low, high)


def cast(call: Call) -> Value:
    dtype = torch_type(call.attribute("to"))
    value = call.value(0)
    if isinstance(value, Tensor):
        return value if value.dtype == dtype else value.to(dtype)
    if dtype == torch.float32:
        return combine(lambda number: number * 1.0, value)
    kind = bool if dtype == torch.bool else _whole
    return combine(kind, value)


def _whole(number: Any) -> Any:
    return number if isinstance(number, int | torch.SymInt) else int(number)


def where(call: Call) -> Value:
    if call.are_numbers():
        operands = [each for each in call.inputs if isinstance(each, Numbers)]
        return combine(lambda c, x, y: x if c else y, *operands)
    return torch.where(call.tensor(0), call.operand(1), call.operand(2))


def leaky_relu(call: Call) -> Value:
    return F.leaky_relu(call.tensor(0), call.attribute("alpha", 0.01))


def prelu(call: Call) -> Value:
    x, slope = call.tensor(0), call.operand(1)
    return torch.where(x > 0, x, x * slope)


def elu(call: Call) -> Value:
    return F.elu(call.tensor(0), call.attribute("alpha", 1.0))


def hard_sigmoid(call: Call) -> Value:
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    x = call.tensor(0)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def gelu(call: Call) -> Value:
    return F.gelu(call.tensor(0), approximate=call.attribute("approximate", "none"))


def softplus(call: Call) -> Value:
    return F.softplus(call.tensor(0))


def identity(call: Call) -> Value:
    """Also dropout, which passes everything where a network is used."""
    return call.value(0)


def softmax(call: Call) -> Value:
    return _along_axis(call, torch.softmax)


def log_softmax(call: Call) -> Value:
    return _along_axis(call, torch.log_softmax)


def _along_axis(call: Call, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    x = call.tensor(0)
    if call.opset >= 13:
        return function(x, call.attribute("axis", -1))
    axis = call.attribute("axis", 1) % x.ndim
    if axis == x.ndim - 1:
        return function(x, -1)
    return function(x.flatten(axis), -1).reshape(x.shape)  # all axes from this one on, as a row


TABLE: dict[str, Callable[[Call], Any]] = {
    "Add": _of_pairs(operator.add),
    "Sub": _of_pairs(operator.sub),
    "Mul": _of_pairs(operator.mul),
    "Div": _of_pairs(_divide, divide),
    "Pow": _of_pairs(torch.pow, operator.pow),
    "Mod": _of_pairs(operator.mod),
    "Min": _of_pairs(_min, min),
    "Max": _of_pairs(_max, max),
    "Sum": _of_pairs(operator.add),
    "Mean": mean,
    "Equal": _of_pairs(operator.eq),
    "Less": _of_pairs(operator.lt),
    "LessOrEqual": _of_pairs(operator.le),
    "Greater": _of_pairs(operator.gt),
    "GreaterOrEqual": _of_pairs(operator.ge),
    "And": _of_pairs(operator.and_),
    "Or": _of_pairs(operator.or_),
    "Xor": _of_pairs(operator.xor),
    "Not": _of_one(torch.logical_not, operator.not_),
    "Neg": _of_one(torch.neg, operator.neg),
    "Abs": _of_one(torch.abs, abs),
    "Sqrt": _of_one(torch.sqrt, lambda number: number**0.5),
    "Reciprocal": _of_one(torch.reciprocal, lambda number: 1 / number),
    "Floor": _of_one(torch.floor, math.floor),
    "Ceil": _of_one(torch.ceil, math.ceil),
    "Round": _of_one(torch.round, round),
    "Exp": _of_one(torch.exp, math.exp),
    "Log": _of_one(torch.log, math.log),
    "Sign": _of_one(torch.sign),
    "Sin": _of_one(torch.sin),
    "Cos": _of_one(torch.cos),
    "Erf": _of_one(torch.erf),
    "Tanh": _of_one(torch.tanh),
    "Sigmoid": _of_one(torch.sigmoid),
    "Relu": _of_one(torch.relu),
    "HardSwish": _of_one(F.hardswish),
    "Softsign": _of_one(F.softsign),
    "Mish": _of_one(F.mish),
    "Selu": _of_one(F.selu),
    "Softplus": softplus,
    "LeakyRelu": leaky_relu,
    "PRelu": prelu,
    "Elu": elu,
    "HardSigmoid": hard_sigmoid,
    "Gelu": gelu,
    "Clip": clip,
    "Cast": cast,
    "Where": where,
    "Identity": identity,
    "Dropout": identity,
    "Softmax": softmax,
    "LogSoftmax": log_softmax,
}
