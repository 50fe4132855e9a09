"""Operators that sum up axes, and products of two activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimdown.load.onnx.call import Call
from slimdown.load.onnx.numbers import Numbers, Value


def _over_axes(
    function: Callable[[Tensor, list[int], bool], Tensor], of_numbers: Any = None
) -> Callable[[Call], Value]:
    def run(call: Call) -> Value:
        axes, keeps = call.axes(1), bool(call.attribute("keepdims", 1))
        value = call.value(0)
        if isinstance(value, Numbers) and of_numbers is not None:
            return Numbers((of_numbers(value.values),), (1,) * len(value.shape) * keeps)
        x = call.tensor(0)
        if not axes:
            if call.attribute("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.ndim))
        return function(x, axes, keeps)

    return run


def _product(x: Tensor, axes: list[int], keeps: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keeps)
    return x


def _extreme(name: str) -> Callable[[Call], Value]:
    def run(call: Call) -> Value:
        call.require("select_last_index", 0)
        function = getattr(torch, name)
        keeps = bool(call.attribute("keepdims", 1))
        return function(call.tensor(0), call.attribute("axis", 0), keeps)  # type: ignore[no-any-return]

    return run


def top_k(call: Call) -> Any:
    x = call.tensor(0)
    (count,) = call.numbers(1)
    axis, largest = call.attribute("axis", -1), bool(call.attribute("largest", 1))
    return torch.topk(x, count, axis, largest, sorted=bool(call.attribute("sorted", 1)))


def matmul(call: Call) -> Value:
    return torch.matmul(call.tensor(0), call.tensor(1))


def gemm(call: Call) -> Value:
    a, b = call.tensor(0), call.tensor(1)
    a = a.t() if call.attribute("transA", 0) else a
    b = b.t() if call.attribute("transB", 0) else b
    product: Tensor = torch.matmul(a, b) * call.attribute("alpha", 1.0)
    return product + call.operand(2) * call.attribute("beta", 1.0) if call.has(2) else product


def einsum(call: Call) -> Value:
    operands = [call.tensor(index) for index in range(len(call.inputs))]
    product: Tensor = torch.einsum(call.attribute("equation"), *operands)
    return product


def cumsum(call: Call) -> Value:
    call.require("exclusive", 0)
    call.require("reverse", 0)
    return call.tensor(0).cumsum(call.operand(1))


TABLE: dict[str, Callable[[Call], Any]] = {
    "ReduceMean": _over_axes(lambda x, axes, keeps: x.mean(axes, keepdim=keeps)),
    "ReduceSum": _over_axes(lambda x, axes, keeps: x.sum(axes, keepdim=keeps), sum),
    "ReduceMax": _over_axes(lambda x, axes, keeps: x.amax(axes, keepdim=keeps), max),
    "ReduceMin": _over_axes(lambda x, axes, keeps: x.amin(axes, keepdim=keeps), min),
    "ReduceProd": _over_axes(_product, math.prod),
    "ReduceL1": _over_axes(lambda x, axes, keeps: x.abs().sum(axes, keepdim=keeps)),
    "ReduceL2": _over_axes(lambda x, axes, keeps: torch.linalg.vector_norm(x, 2, axes, keeps)),
    "ReduceSumSquare": _over_axes(lambda x, axes, keeps: x.square().sum(axes, keepdim=keeps)),
    "ReduceLogSumExp": _over_axes(lambda x, axes, keeps: x.logsumexp(axes, keeps)),
    "ArgMax": _extreme("argmax"),
    "ArgMin": _extreme("argmin"),
    "TopK": top_k,
    "MatMul": matmul,
    "Gemm": gemm,
    "Einsum": einsum,
    "CumSum": cumsum,
}
