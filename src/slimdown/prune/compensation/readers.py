"""Layers as linear maps: what each output position reads, and the weights as a matrix.

A convolution is a product of patches with a matrix, one for each of its groups; a transposed one
is that after zeros were put between the pixels of its input; a linear layer has patches of one
position. So one regression corrects them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from slimdown.capture.call import arguments_of, operator_name
from slimdown.prune.sites import LINEAR, TRANSPOSED


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How a layer reads; of a linear layer, which has no kernel, all tuples are empty."""

    groups: int
    transposed: bool
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """Zeros before and after, for each axis of positions; negative where values are cut off."""
    spacing: tuple[int, ...]
    """One value of the input stands every so many positions, with zeros between."""

    @property
    def axis(self) -> int:
        """Of the channels, in the input as in the output."""
        return 1 if self.kernel else -1

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (G, D, K): the D values of a patch to the K outputs of a group."""
        # (G, K, C, …), transposed (G, C, K, …)
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        if self.transposed:
            grouped = grouped.flip(self._kernel_axes).transpose(1, 2)
        return grouped.flatten(2).mT

    def weight(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        grouped = matrix.mT.reshape(self.groups, matrix.shape[2], -1, *self.kernel)
        if self.transposed:
            grouped = grouped.transpose(1, 2).flip(self._kernel_axes)
        return grouped.flatten(0, 1)

    @property
    def _kernel_axes(self) -> tuple[int, ...]:
        return tuple(range(3, 3 + len(self.kernel)))

    def outputs(self, value: Tensor, positions: Tensor) -> Tensor:
        """The layer's outputs at some positions, counted over all images: (N, G·K)."""
        return value.movedim(self.axis, -1).flatten(0, -2)[positions]

    def by_group(self, rows: Tensor) -> Tensor:
        """(N, G·K) as (G, N, K)."""
        return rows.reshape(len(rows), self.groups, -1).transpose(0, 1)

    def ungrouped(self, rows: Tensor) -> Tensor:
        """(G, N, K) as (N, G·K)."""
        return rows.transpose(0, 1).flatten(1)

    def patches(self, value: Tensor, positions: Tensor) -> Tensor:
        """What the layer reads of its input for the outputs at some positions: (G, N, D)."""
        if not self.kernel:
            return value.flatten(0, -2)[positions][None]
        value = self._spread(value)
        sizes = [
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(
                value.shape[1:-1], self.kernel, self.stride, self.dilation, strict=True
            )
        ]
        image, *places = torch.unravel_index(positions, (len(value), *sizes))
        taps = []
        for offsets in product(*map(range, self.kernel)):
            steps = zip(places, self.stride, offsets, self.dilation, strict=True)
            at = (p * stride + offset * dilation for p, stride, offset, dilation in steps)
            taps.append(value[(image, *at)])
        patches = torch.stack(taps, -1)  # (N, G·C, kernel)
        return self.by_group(patches.flatten(1))

    def _spread(self, value: Tensor) -> Tensor:
        """The input with its zeros between and around, channels last."""
        if any(step > 1 for step in self.spacing):
            sizes = [
                (size - 1) * step + 1
                for size, step in zip(value.shape[2:], self.spacing, strict=True)
            ]
            spread = value.new_zeros(*value.shape[:2], *sizes)
            places: tuple[Any, ...] = tuple(slice(None, None, step) for step in self.spacing)
            spread[(..., *places)] = value
            value = spread
        around = [amount for pair in reversed(self.padding) for amount in pair]
        return F.pad(value, around).movedim(1, -1)


def reader_of(node: Node, weight: Tensor) -> Reader:
    """How a call of a convolution or linear layer reads its input."""
    arguments, name = arguments_of(node), operator_name(node)
    if name == LINEAR:
        return Reader(
            groups=1, transposed=False, kernel=(), stride=(), dilation=(), padding=(), spacing=()
        )
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_each(arguments[key], kernel) for key in ("stride", "dilation"))
    transposed = name in TRANSPOSED
    if transposed:
        extra = _each(arguments["output_padding"], kernel)
        pads = zip(_each(arguments["padding"], kernel), kernel, dilation, extra, strict=True)
        padding = [((k - 1) * d - p, (k - 1) * d - p + more) for p, k, d, more in pads]
    else:
        padding = _padding(arguments["padding"], kernel, dilation)
    ones = (1,) * len(kernel)
    return Reader(
        groups=int(arguments["groups"]),
        transposed=transposed,
        kernel=kernel,
        stride=ones if transposed else stride,
        dilation=dilation,
        padding=tuple(padding),
        spacing=stride if transposed else ones,
    )


def _padding(
    given: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    if given == "valid":
        return [(0, 0) for _ in kernel]
    if given == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _each(given, kernel)]


def _each(given: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    values = [given] if isinstance(given, int) else list(given)
    return tuple(values * len(kernel) if len(values) == 1 else values)
