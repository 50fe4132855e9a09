"""The table of operators: what each of them computes, in torch's own functions.

To add an operator: write it in the file of its family, and add its line to the table there. Layers
with weights of their own become modules: see `layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slimdown.load.onnx.call import Call
from slimdown.load.onnx.ops import indexing, pointwise, pooling, reductions, resize, shapes

TABLE: dict[str, Callable[[Call], Any]] = {
    **pointwise.TABLE,
    **shapes.TABLE,
    **indexing.TABLE,
    **reductions.TABLE,
    **pooling.TABLE,
    **resize.TABLE,
}
