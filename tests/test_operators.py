"""An ONNX graph as kernels: what is fused where, what is free, and the work of each, by hand."""

from __future__ import annotations

from typing import Any

import onnx
import onnx.helper as oh
import pytest

from edgegen import operators, probes
from edgegen.operators import Kernel, kernels
from edgegen.types import PrecisionPlan

FLOAT = onnx.TensorProto.FLOAT


def weight(name: str, *shape: int) -> onnx.TensorProto:
    size = 1
    for d in shape:
        size *= d
    return oh.make_tensor(name, FLOAT, shape, [0.5] * size)


def network(nodes: list[Any], weights: list[Any], shape: tuple[int, ...], out: tuple[int, ...]) -> onnx.ModelProto:
    """A model from `x` to `y`."""
    ends = (oh.make_tensor_value_info("x", FLOAT, shape), oh.make_tensor_value_info("y", FLOAT, out))
    graph = oh.make_graph(nodes, "g", [ends[0]], [ends[1]], weights)
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)])


def inner(model: onnx.ModelProto, runtime: str, plan: PrecisionPlan | None = None) -> list[Kernel]:
    """Kernels without the run and the copies."""
    return [k for k in kernels(model, runtime, plan) if k.kind not in ("run", "input", "output")]


def residual() -> onnx.ModelProto:
    """relu(x + conv(relu(conv(x)))), 8 channels at 4x4."""
    nodes = [
        oh.make_node("Conv", ["x", "w"], ["a"], "c1", pads=[1, 1, 1, 1]),
        oh.make_node("Relu", ["a"], ["b"], "r1"),
        oh.make_node("Conv", ["b", "w", "bias"], ["c"], "c2", pads=[1, 1, 1, 1]),
        oh.make_node("Add", ["c", "x"], ["d"], "add"),
        oh.make_node("Relu", ["d"], ["y"], "r2"),
    ]
    return network(nodes, [weight("w", 8, 8, 3, 3), weight("bias", 8)], (1, 8, 4, 4), (1, 8, 4, 4))


def test_activation_and_shortcut_are_fused_where_the_runtime_fuses_them() -> None:
    first, second = inner(residual(), "openvino")
    assert (first.fused, second.fused) == (("Relu",), ("Add", "Relu"))
    apart = inner(residual(), "executorch")
    assert [k.kind for k in apart] == ["conv3x3", "conv3x3", "elementwise"]
    assert [k.fused for k in apart] == [("Relu",), (), ("Add", "Relu")]
    assert [k.kind for k in inner(residual(), "ncnn")] == ["conv3x3", "conv3x3", "elementwise", "activation"]


def test_the_figures_of_a_convolution_are_those_counted_by_hand() -> None:
    first, second = inner(residual(), "openvino")
    elements = 8 * 4 * 4
    assert first.macs == elements * 8 * 9
    assert (first.bytes_in, first.bytes_weights, first.bytes_out) == (4 * elements, 4 * 8 * 8 * 9, 4 * elements)
    assert (first.channels_in, first.channels_out, first.height, first.width) == (8, 8, 4, 4)
    assert (first.kernel, first.stride, first.groups) == ((3, 3), 1, 1)
    assert second.bytes_in == 2 * 4 * elements  # the shortcut is read as well
    assert second.bytes_weights == 4 * (8 * 8 * 9 + 8)


def test_int8_layers_move_a_quarter_and_what_the_plan_leaves_in_float_does_not() -> None:
    plan = PrecisionPlan("int8", float_layers=("c2",))
    there, first, back, second = inner(residual(), "openvino", plan)
    assert (there.kind, there.bytes_in, there.bytes_out) == ("cast", 512, 128)
    assert (back.kind, back.bytes_in, back.bytes_out) == ("cast", 128, 512)
    assert (first.precision, first.bytes_in, first.bytes_weights) == ("int8", 128, 576)
    assert (second.precision, second.bytes_out) == ("fp32", 512)


def test_between_layers_in_int8_nothing_is_cast() -> None:
    found = inner(residual(), "onnxruntime", PrecisionPlan("int8"))
    assert [(k.kind, k.precision) for k in found] == [
        ("cast", "int8"), ("conv3x3", "int8"), ("conv3x3", "int8"), ("elementwise", "int8"), ("activation", "int8"),
    ]  # fmt: skip
    assert (found[0].bytes_in, found[0].bytes_out) == (512, 128)  # x, once for the layer and the shortcut


def branches(norm: bool) -> onnx.ModelProto:
    """relu((conv(x) + conv(x)) + bn(x)), 8 channels at 4x4; without the norm, the sum alone."""
    nodes = [
        oh.make_node("Conv", ["x", "w"], ["a"], "c1", pads=[1, 1, 1, 1]),
        oh.make_node("Conv", ["x", "w"], ["b"], "c2", pads=[1, 1, 1, 1]),
        oh.make_node("Add", ["a", "b"], ["y" if not norm else "c"], "add"),
    ]
    if norm:
        nodes += [oh.make_node("BatchNormalization", ["x", "s", "s", "s", "s"], ["n"], "bn"),
                  oh.make_node("Add", ["c", "n"], ["d"], "more"), oh.make_node("Relu", ["d"], ["y"], "r")]  # fmt: skip
    return network(nodes, [weight("w", 8, 8, 3, 3), weight("s", 8)], (1, 8, 4, 4), (1, 8, 4, 4))


def test_a_sum_belongs_to_what_is_made_last() -> None:
    assert [k.fused for k in inner(branches(False), "openvino")] == [(), ("Add",)]
    found = inner(branches(True), "onnxruntime")  # which makes a convolution of the norm
    assert [(k.kind, k.fused) for k in found] == [
        ("conv3x3", ()), ("conv3x3", ("Add",)), ("scale", ("BatchNormalization", "Add", "Relu")),
    ]  # fmt: skip
    assert found[2].bytes_in == 2 * 4 * 128


@pytest.mark.parametrize(
    ("op", "shape", "attributes", "kind", "macs"),
    [
        ("Conv", (8, 8, 1, 1), {}, "conv1x1", 8 * 16 * 8),
        ("Conv", (8, 8, 3, 3), {"pads": [1] * 4}, "conv3x3", 8 * 16 * 72),
        ("Conv", (8, 8, 5, 5), {"pads": [2] * 4}, "conv", 8 * 16 * 200),
        ("Conv", (8, 1, 3, 3), {"pads": [1] * 4, "group": 8}, "depthwise", 8 * 16 * 9),
        ("Conv", (8, 4, 3, 3), {"pads": [1] * 4, "group": 2}, "grouped", 8 * 16 * 36),
        ("ConvTranspose", (8, 8, 1, 1), {}, "transposed", 8 * 16 * 8),
    ],
)
def test_kinds_of_convolutions(op: str, shape: tuple, attributes: dict, kind: str, macs: int) -> None:
    model = network([oh.make_node(op, ["x", "w"], ["y"], **attributes)], [weight("w", *shape)], (1, 8, 4, 4),
                    (1, 8, 4, 4))  # fmt: skip
    (found,) = inner(model, "onnxruntime")
    assert (found.kind, found.macs) == (kind, macs)


def test_reshapes_are_free_and_movements_norms_and_pools_are_not() -> None:
    nodes = [
        oh.make_node("Transpose", ["x"], ["a"], perm=[0, 2, 3, 1]),
        oh.make_node("LayerNormalization", ["a", "s"], ["b"], axis=-1),
        oh.make_node("Reshape", ["b", "size"], ["c"]),
        oh.make_node("Softmax", ["c"], ["d"]),
        oh.make_node("ReduceMean", ["d"], ["y"], keepdims=1),
    ]
    size = oh.make_tensor("size", onnx.TensorProto.INT64, (3,), [1, 16, 8])
    found = inner(network(nodes, [weight("s", 8), size], (1, 8, 4, 4), (1, 1, 1)), "ncnn")
    assert [k.kind for k in found] == ["transpose", "layernorm", "softmax", "pool"]
    assert found[1].bytes_weights == 4 * 8
    assert found[2].curved == 128
    assert (found[3].bytes_in, found[3].bytes_out) == (512, 4)


def test_products_of_computed_matrices_read_both_and_have_no_weights() -> None:
    nodes = [oh.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), oh.make_node("MatMul", ["x", "t"], ["y"])]
    found = inner(network(nodes, [], (2, 4, 8), (2, 4, 4)), "onnxruntime")[1]
    assert (found.kind, found.macs, found.groups) == ("matmul", 2 * 4 * 4 * 8, 2)
    assert (found.bytes_in, found.bytes_weights, found.bytes_out) == (2 * 4 * 2 * 32, 0, 4 * 32)


@pytest.mark.parametrize(
    ("nodes", "op"),
    [
        ([("Sigmoid", ["a"], "s"), ("Mul", ["a", "s"], "y")], "Silu"),
        ([("HardSigmoid", ["a"], "s"), ("Mul", ["s", "a"], "y")], "HardSwish"),
        ([("Div", ["a", "k"], "s"), ("Erf", ["s"], "e"), ("Add", ["e", "k"], "f"), ("Mul", ["a", "f"], "g"),
          ("Mul", ["g", "k"], "y")], "Gelu"),
        ([("Div", ["a", "k"], "s"), ("Erf", ["s"], "e"), ("Add", ["e", "k"], "f"), ("Mul", ["a", "k"], "g"),
          ("Mul", ["g", "f"], "y")], "Gelu"),
    ],
)  # fmt: skip
def test_activations_written_as_several_nodes_are_one(nodes: list, op: str) -> None:
    made = [oh.make_node("Conv", ["x", "w"], ["a"]), *(oh.make_node(o, i, [out]) for o, i, out in nodes)]
    model = network(made, [weight("w", 8, 8, 1, 1), weight("k", 1)], (1, 8, 4, 4), (1, 8, 4, 4))
    assert [k.fused for k in inner(model, "openvino")] == [(op,)]
    alone = inner(model, "litert")
    assert [k.kind for k in alone] == ["conv1x1", "activation"]
    assert alone[1].fused == (op,)
    assert alone[1].bytes_moved == 2 * 4 * 128


def test_a_kernel_survives_its_row_and_a_wrong_row_is_refused() -> None:
    kernel = inner(residual(), "openvino")[0]
    row = operators.to_row(kernel)
    again = operators.from_row(row)
    assert operators.to_row(again) == row
    assert again.kernel == (3, 3)
    with pytest.raises(ValueError, match="unknown kind"):
        operators.from_row(["nonsense", *row[1:]])
    with pytest.raises(ValueError, match="zip"):
        operators.from_row(row[:-1])


def test_shapes_that_are_not_static_are_refused() -> None:
    model = residual()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"
    with pytest.raises(ValueError, match="static"):
        kernels(model, "openvino")


def test_samples_are_the_same_for_a_seed_and_a_longer_list_begins_with_a_shorter_one() -> None:
    assert probes.sample(60, seed=3)[:40] == probes.sample(40, seed=3)
    assert probes.sample(40, seed=3) != probes.sample(40, seed=4)
    strata = {probe["name"].split()[0] for probe in probes.sample(len(probes.STRATA) + 1)}
    assert strata == {"empty", *(make.__name__.strip("_") for make in probes.STRATA)}


def test_every_kind_of_probe_is_a_network_that_runs() -> None:
    import torch

    for probe in probes.sample(len(probes.STRATA) + 1, seed=1):
        stage = probes.stage(probe)
        small = [1, probe["input"][1], *[min(d, 16) for d in probe["input"][2:]]] if len(probe["input"]) == 4 else None
        with torch.no_grad():
            assert torch.isfinite(stage.module(torch.zeros(small or probe["input"]))).all()


def test_probes_of_a_network_are_its_different_layers() -> None:
    found = probes.of_kernels(inner(residual(), "openvino"))
    assert [probe["input"] for probe in found] == [[1, 8, 4, 4]]  # both convolutions are the same
    assert found[0]["layers"] == [["conv", 8, 3, 1, 1, "relu"]]
