"""INT8 on processors that add two products in 16 bits: weights of 7 bits keep the sums exact."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from int8_builds import RUNTIMES, TARGET, skip_without
from onnx import numpy_helper
from torch import nn

from edgegen import onnx_exact, onnx_graph, onnx_narrow, registry, variants
from edgegen.devices import local
from edgegen.passes import _scaling, _simulate
from edgegen.runtimes import _common
from edgegen.types import PrecisionPlan, Stage, TensorSpec

OLD, NEW, ARM = frozenset(("sse4_2", "avx2")), frozenset(("avx2", "avx_vnni")), frozenset(("asimd", "asimddp"))
INPUTS = np.full((1, 64, 8, 8), 255, np.float32)


@pytest.mark.parametrize(
    ("flags", "cut"),
    [(OLD, True), (OLD | {"avx512f"}, True), (NEW, False), (OLD | {"avx512_vnni"}, False), (ARM, False),
     (frozenset(), False)],
)  # fmt: skip
def test_processors_that_cut_off_sums_are_known_by_their_flags(flags: frozenset[str], cut: bool):
    assert _common.saturates(flags) == cut


def test_this_processor_does_what_its_flags_say():
    if not local.cpu_flags() & {"avx2"}:
        pytest.skip("no x86 processor with AVX2, or its flags are not told")
    assert onnx_exact.saturates() == _common.saturates(local.cpu_flags())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_plans_have_seven_bits_only_where_this_host_needs_them(runtime: str):
    module = registry.module("runtimes", runtime)
    elsewhere = dataclasses.replace(TARGET, is_host=False)

    def widths(target, flags) -> set[str]:
        offered = (*module.plans(target, flags), *module.int8_from_int4(target, flags))
        return {plan.format[-2:] for plan in offered if plan.precision == "int8"}

    assert widths(TARGET, OLD) == {"s7"}
    for target, flags in ((TARGET, NEW), (TARGET, ARM), (elsewhere, OLD)):
        assert "s7" not in widths(target, flags)
    assert not any(plan.format for plan in module.plans(TARGET, OLD) if plan.precision != "int8")


def test_a_recipe_that_asks_for_a_format_gets_it_in_seven_bits():
    for given, asked, wanted in (("u8s7", ["u8s8"], True), ("s8s7", ["u8s8"], False), ("s8s8", ["s8s8"], True),
                                 ("", ["s8s8"], True), ("u8s7", ["u8s8", "s8s8"], True)):  # fmt: skip
        assert variants._asked(PrecisionPlan("int8", given), asked) == wanted, given


def narrowed(model: onnx.ModelProto, most: int) -> onnx.ModelProto:
    """The same network with weights of this size."""
    for tensor in model.graph.initializer:
        if tensor.name == "weights":
            tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, most, np.int8), "weights"))
    return model


def integer(model: onnx.ModelProto) -> np.ndarray:
    """What ONNX Runtime's integer kernels make of it."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": INPUTS})[0]


def test_the_largest_sums_are_exact_in_seven_bits_on_every_processor():
    step = 127 * 64  # of the output
    assert np.abs(integer(narrowed(onnx_exact._extreme(64), 64)) - 255 * 64 * 64).max() <= step / 2
    cut = np.abs(integer(onnx_exact._extreme(64)) - 255 * 127 * 64).max() > step / 2
    assert cut == onnx_exact.saturates()


def test_a_simulation_of_eight_bits_is_exact_on_every_processor():
    session = onnx_exact.session(onnx_exact._extreme(64).SerializeToString(), threads=1)
    assert np.abs(session.run(None, {"x": INPUTS})[0] - 255 * 127 * 64).max() <= 127 * 64 / 2


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_build_for_this_host_computes_large_sums(runtime: str, tmp_path: Path):
    """All inputs at their largest, weights of one sign: the worst that 8 bits can add up."""
    skip_without(runtime)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1)).eval()
    for layer in (net[0], net[2]):
        layer.weight.data = layer.weight.data.sign() * (0.5 + layer.weight.data.abs())
        layer.weight.data[:4] = layer.weight.data[:4].abs()
    specs = (TensorSpec("input", (1, 32, 8, 8)),), (TensorSpec("output", (1, 8, 8, 8)),)
    x = np.random.default_rng(0).uniform(0.8, 1.0, (8, 32, 8, 8)).astype(np.float32)
    np.save(tmp_path / "input.npy", x)
    made = onnx_graph.to_onnx(Stage("main", net, *specs), tmp_path / "float.onnx")
    module = registry.module("runtimes", runtime)
    plan = next(p for p in module.plans(TARGET, local.cpu_flags()) if p.precision == "int8")
    with torch.no_grad():
        exact = net(torch.from_numpy(x[:1])).numpy()

    def error(plan: PrecisionPlan, name: str) -> float:
        artifact = module.build(dataclasses.replace(made, plan=plan), tmp_path / name, calibration=tmp_path,
                                target=TARGET)  # fmt: skip
        with module.load(artifact) as run:
            return float(np.square(run({"input": x[:1]})["output"] - exact).sum() / np.square(exact).sum())

    assert error(plan, "for-this-host") < 1e-3
    if onnx_exact.saturates():  # and the test can tell
        eight = "u8s8" if runtime == "onnxruntime" else ""
        assert error(dataclasses.replace(plan, format=eight), "eight") > 1e-2


def test_training_and_rounding_know_the_width(monkeypatch: pytest.MonkeyPatch):
    layer = nn.Conv2d(4, 4, 3)
    for cut, kind, levels in ((True, "u8s7", 64), (False, "u8s8", 127)):
        monkeypatch.setattr(onnx_exact, "saturates", lambda cut=cut: cut)
        assert _simulate.plan_of(TARGET).format == kind
        assert _simulate.plan_of(TARGET, "int4") == PrecisionPlan("int8", kind, weights="int4")
        assert _simulate.plan_of(dataclasses.replace(TARGET, is_host=False)).format == "u8s8"
        integers = _scaling.snapped(layer, levels=levels) / _scaling.grid(layer, levels)
        assert float(integers.abs().max()) == pytest.approx(levels, rel=1e-5)
        assert torch.allclose(integers, integers.round(), atol=1e-3)
        taught = _simulate.fake_weight(layer, layer.weight, levels=levels)
        assert torch.allclose(taught, _scaling.snapped(layer, levels=levels), atol=1e-7)


def test_openvino_keeps_weights_that_lie_on_the_grid(tmp_path: Path):
    """NNCF's own 7 bits have their largest weight at 63.5 steps: all others would move by a share of it."""
    skip_without("openvino")
    from edgegen.runtimes import _ir, _ov_narrow

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(),
                        nn.ConvTranspose2d(16, 8, 2)).eval()  # fmt: skip
    for layer in (net[0], net[2], net[4]):
        layer.weight.data = _scaling.snapped(layer, levels=onnx_narrow.SEVEN_BITS)
    specs = (TensorSpec("input", (1, 8, 8, 8)),), (TensorSpec("output", (1, 8, 5, 5)),)
    np.save(tmp_path / "input.npy", np.random.default_rng(0).random((4, 8, 8, 8), np.float32))
    made = onnx_graph.to_onnx(Stage("main", net, *specs), tmp_path / "float.onnx")
    plan = PrecisionPlan("int8", "u8s7", ranges="mean")
    artifact = registry.module("runtimes", "openvino").build(
        dataclasses.replace(made, plan=plan), tmp_path / "out", calibration=tmp_path, target=TARGET
    )
    found = [_ov_narrow._dequantized(op) for op in _ir.read(artifact.path).get_ordered_ops()
             if op.get_type_name() in ("Convolution", "GroupConvolution", "ConvolutionBackpropData")]  # fmt: skip
    assert len(found) == 3
    for (_, integers, step), layer in zip(found, (net[0], net[2], net[4]), strict=True):
        held = (integers * step).reshape(layer.weight.shape)
        assert int(np.abs(integers.astype(int)).max()) == 64
        assert np.abs(held - layer.weight.detach().numpy()).max() <= 1e-6
