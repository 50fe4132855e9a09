"""Files that cannot be used, and those that could do harm."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from slimdown.errors import BadInput, RecipeError
from slimdown.load import ModelSource, load_model
from slimdown.load.onnx import load_onnx

Change = Callable[[onnx.ModelProto], None]
WEIGHT = np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file of one convolution, its proto changed by a function."""

    def write(change: Change | None = None, *, opset: int = 17, **image: Any) -> Path:
        kind, shape = image.get("kind", TensorProto.FLOAT), image.get("shape", ["n", 3, 8, 8])
        graph = helper.make_graph(
            [helper.make_node("Conv", ["x", "w"], ["y"], name="/stem/Conv")],
            "g",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(WEIGHT, "w")],
        )
        opsets = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        if change is not None:
            change(model)
        path = tmp_path / "net.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


def replace_node(op: str, **settings: Any) -> Change:
    """Put another operator in the place of the convolution."""

    def change(model: onnx.ModelProto) -> None:
        del model.graph.node[:]
        inputs = settings.pop("inputs", ["x"])
        model.graph.node.append(helper.make_node(op, inputs, ["y"], name="/stem/it", **settings))

    return change


def test_the_weight_is_where_its_node_says(write: Callable[..., Path]) -> None:
    module = load_onnx(write())
    assert list(module.state_dict()) == ["w.weight"]
    assert torch.equal(module.w.weight, torch.from_numpy(WEIGHT))


# -------------------------------------------------------------------------------- what it is


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"there is no file .*net\.onnx"):
        load_onnx(tmp_path / "net.onnx")


@pytest.mark.parametrize("content", [b"", b"no network", bytes(range(256)) * 20])
def test_a_file_of_something_else(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"net\.onnx is damaged"):
        load_onnx(path)


def test_half_a_file(write: Callable[..., Path]) -> None:
    path = write()
    whole = path.read_bytes()
    for length in range(1, len(whole), 23):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput):
            load_onnx(path)


def test_a_flipped_byte_is_refused_or_loads(write: Callable[..., Path]) -> None:
    path = write()
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with suppress(BadInput):  # no other error, and no crash
            load_onnx(path)


def test_more_than_2_gb(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with path.open("wb") as stream:
        os.truncate(stream.fileno(), 2**31)  # holes take no room on the disk
    with pytest.raises(BadInput, match=r"2\.0 GB.*save_as_external_data"):
        load_onnx(path)


def test_an_old_opset(write: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match=r"opset 9.*convert_version"):
        load_onnx(write(opset=9))


def test_a_quantized_file(write: Callable[..., Path]) -> None:
    def quantize(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "s"))
        replace_node("QuantizeLinear", inputs=["x", "s"])(model)

    with pytest.raises(BadInput, match=r"quantized already.*QuantizeLinear '/stem/it'.*float32"):
        load_onnx(write(quantize))


def test_half_precision(write: Callable[..., Path]) -> None:
    def halve(model: onnx.ModelProto) -> None:
        half = numpy_helper.from_array(WEIGHT.astype(np.float16), "w")
        model.graph.initializer[0].CopyFrom(half)

    with pytest.raises(BadInput, match=r"float16: 'w'.*precision: float16"):
        load_onnx(write(halve))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replace_node("NonMaxSuppression", inputs=["x", "x"]), "NonMaxSuppression '/stem/it'"),
        (replace_node("Gelu", domain="com.microsoft"), "com.microsoft::Gelu '/stem/it'"),
    ],
)
def test_an_operator_that_is_not_supported(
    change: Change, named: str, write: Callable[..., Path]
) -> None:
    def with_domain(model: onnx.ModelProto) -> None:
        change(model)
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    with pytest.raises(BadInput, match=f"not supported: {named}.*without post-processing"):
        load_onnx(write(with_domain))


def test_an_output_that_no_image_reaches(write: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match="'y' does not depend on the image"):
        load_onnx(write(replace_node("Identity", inputs=["w"])))


# ---------------------------------------------------------------------------------- its input


def test_integer_images(write: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match=r"'x' is UINT8.*without the conversion"):
        load_onnx(write(replace_node("Identity"), kind=TensorProto.UINT8))


def test_several_inputs(write: Callable[..., Path]) -> None:
    def add_input(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("size", TensorProto.FLOAT, [2]))

    with pytest.raises(BadInput, match=r"2 inputs \(x, size\).*extract_model"):
        load_onnx(write(add_input))


def test_weights_that_are_listed_as_inputs(write: Callable[..., Path]) -> None:
    def list_weight(model: onnx.ModelProto) -> None:
        shape = list(WEIGHT.shape)
        model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, shape))

    assert load_onnx(write(list_weight))(torch.zeros(2, 3, 8, 8)).shape == (2, 5, 6, 6)


def test_an_input_that_is_no_image(write: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match="'x' has 2 dimensions"):
        load_onnx(write(replace_node("Identity"), shape=[1, 10]))


def test_another_size_than_it_was_made_for(write: Callable[..., Path]) -> None:
    module = load_onnx(write())
    with pytest.raises(BadInput, match=r"takes images of 3x8x8, got 3x16x8.*preprocess\.size"):
        module(torch.zeros(1, 3, 16, 8))


def test_any_size_where_the_file_allows_it(write: Callable[..., Path]) -> None:
    module = load_onnx(write(shape=["n", 3, "h", "w"]))
    assert module(torch.zeros(2, 3, 16, 9)).shape == (2, 5, 14, 7)
    with pytest.raises(BadInput, match="3xanyxany, got 4x16x9"):
        module(torch.zeros(2, 4, 16, 9))


def test_channels_last(write: Callable[..., Path]) -> None:
    def move_channels(model: onnx.ModelProto) -> None:
        model.graph.node[0].input[0] = "moved"
        node = helper.make_node("Transpose", ["x"], ["moved"], perm=[0, 3, 1, 2])
        model.graph.node.insert(0, node)

    images = torch.randn(2, 3, 8, 8)
    wanted = load_onnx(write())(images)
    assert torch.equal(load_onnx(write(move_channels, shape=["n", 8, 8, 3]))(images), wanted)


# ------------------------------------------------------------------------------ external data


def external(location: str, **told: Any) -> Change:
    """Keep the weight in another file."""

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **told}.items():
            tensor.external_data.add(key=key, value=str(value))

    return change


def test_weights_beside_it(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "net.data").write_bytes(b"12345678" + WEIGHT.tobytes())
    path = write(external("net.data", offset=8, length=WEIGHT.nbytes))
    assert torch.equal(load_onnx(path).w.weight, torch.from_numpy(WEIGHT))


@pytest.mark.parametrize("location", ["../net.data", "{absolute}", "a/../../net.data", "", "link"])
def test_weights_outside_of_its_folder(
    location: str, write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write()
    outside = path.parent.parent / "net.data"
    outside.write_bytes(WEIGHT.tobytes())
    (path.parent / "a").mkdir()
    (path.parent / "link").symlink_to(outside)
    try:
        with pytest.raises(BadInput, match=r"refused .*outside of its own folder"):
            load_onnx(write(external(location.format(absolute=outside))))
    finally:
        outside.unlink()


def test_weights_that_are_missing(write: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match=r"net\.data, which is missing beside it"):
        load_onnx(write(external("net.data")))


@pytest.mark.parametrize(("offset", "length"), [(0, 10**6), (10**6, 8), (-8, 8), (4, 8), ("x", 8)])
def test_weights_that_are_not_whole(
    offset: Any, length: int, write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "net.data").write_bytes(WEIGHT.tobytes())
    with pytest.raises(BadInput, match=r"'w'|tensor name: w"):
        load_onnx(write(external("net.data", offset=offset, length=length)))


# ---------------------------------------------------------------------------------- reference


def test_an_onnx_file_takes_no_options(write: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="leave them out"):
        load_model(ModelSource(str(write()), options={"num_classes": 3}))
