"""What zeros are worth: the compressed size, measured, and what runtimes document of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from slimdown.core import Json

RUNTIMES: dict[str, str] = {
    "onnxruntime": (
        "has no kernels that skip zeros, so no speed is to be expected of them; the file is as "
        "large, and smaller once zipped"
    ),
    "openvino": (
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE packs the weights of INT8 matrix multiplications "
        "that have at least that share of zeros (documented for 4th generation Xeon with AMX); "
        "elsewhere zeros run like other weights"
    ),
    "tensorrt": (
        "the builder flag SPARSE_WEIGHTS lets it choose 2:4 kernels on GPUs since Ampere; whether "
        "they are faster for a layer, it measures"
    ),
    "torch": (
        "torch.sparse.to_sparse_semi_structured runs linear layers with 2:4 weights on GPUs since "
        "Ampere, in half precision or INT8"
    ),
}
"""As the runtimes document it; none of it is a promise of speed: measure where it runs."""

LEVEL = 6
"""Of zlib; the default of zip tools."""


def compressed_bytes(tensors: Iterable[Tensor]) -> int:
    """The size of tensors after zlib, each in its own type, measured."""
    packer = zlib.compressobj(LEVEL)
    size = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        size += len(packer.compress(flat.view(torch.uint8).numpy().tobytes()))
    return size + len(packer.flush())


def describe_gains(before: Iterable[Tensor], after: Iterable[Tensor]) -> Json:
    """The facts of a sparse model that tell what it is good for."""
    return {
        "compressed_bytes": [compressed_bytes(before), compressed_bytes(after)],
        "runtimes": dict(RUNTIMES),
    }
