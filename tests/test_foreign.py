"""Files of others: torch exports and ONNX files load for post-training, and what carries code is refused."""

from __future__ import annotations

import dataclasses
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from edgegen import foreign, loading
from edgegen.errors import ModelError
from edgegen.loading import ModelOptions, load_model

GREY = ModelOptions(task="restoration", input_shape=(1, 8, 8), value_range=(0, 1), mean=(), std=(), output_range=(0, 1))


pytestmark = pytest.mark.usefixtures("one_thread")


def _refused(spec: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(spec), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _exported(path: Path, net: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = net or nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net, (torch.rand(1, 1, 8, 8),)), path)
    return net


def test_torch_export_loads_for_post_training(tmp_path: Path) -> None:
    net = _exported(tmp_path / "m.pt2")
    model = load_model(str(tmp_path / "m.pt2"), options=dataclasses.replace(GREY, input_shape=None))
    x = torch.rand(1, 1, 8, 8)
    assert torch.equal(model.stage.module(x), net(x))
    assert loading.capabilities(model) == frozenset() and model.origin["kind"] == "pt2"
    assert model.stage.inputs[0].shape == (1, 1, 8, 8)
    assert "takes the input shape" in _refused(
        tmp_path / "m.pt2", options=dataclasses.replace(GREY, input_shape=(1, 9, 9))
    )
    assert "give --task" in _refused(tmp_path / "m.pt2")
    assert "carries its own weights" in _refused(tmp_path / "m.pt2", weights=tmp_path / "w.pth")


def test_damaged_torch_exports_are_refused(tmp_path: Path) -> None:
    assert "no such file" in _refused(tmp_path / "none.pt2", options=GREY)
    _exported(tmp_path / "m.pt2")
    whole = (tmp_path / "m.pt2").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-1]):
        (tmp_path / "t.pt2").write_bytes(content)
        assert "t.pt2" in _refused(tmp_path / "t.pt2", options=GREY)


class _Code:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_torch_export_with_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    _exported(tmp_path / "m.pt2")
    torch.save(_Code(tmp_path / "ran"), tmp_path / "code.pt")
    touched = []
    with zipfile.ZipFile(tmp_path / "m.pt2") as good, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as evil:
        for name in good.namelist():
            bad = "sample_inputs" in name and name.endswith(".pt")
            touched += [name] if bad else []
            evil.writestr(name, (tmp_path / "code.pt").read_bytes() if bad else good.read(name))
    assert touched
    assert "without running code from it" in _refused(tmp_path / "evil.pt2", options=GREY)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_exported_graph_with_foreign_functions_is_refused() -> None:
    graph = torch.fx.Graph()
    graph.call_function(os.getcwd)
    program = type("Program", (), {"graph_module": torch.fx.GraphModule(nn.Module(), graph)})
    with pytest.raises(ModelError, match="which is no torch operator; refused"):
        foreign._check_functions(program, Path("m.pt2"))


def _onnx(path: Path, shape: list[Any] | None = None, inputs: int = 1) -> Path:
    given = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape or [1, 1, 8, 8]) for i in range(inputs)]
    node = helper.make_node("Relu", ["x0"], ["y"])
    graph = helper.make_graph([node], "g", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_onnx_file_loads_without_module(tmp_path: Path) -> None:
    model = load_model(str(_onnx(tmp_path / "m.onnx", ["batch", 1, "h", "w"])), options=GREY)
    stage = model.stage
    assert stage.module is None and stage.onnx == tmp_path / "m.onnx"
    assert (stage.inputs[0].name, stage.outputs[0].name) == ("x0", "y")
    assert stage.inputs[0].shape == stage.outputs[0].shape == (1, 1, 8, 8)
    assert loading.capabilities(model) == frozenset()


def test_bad_onnx_files_are_refused(tmp_path: Path) -> None:
    path = _onnx(tmp_path / "m.onnx")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello"):
        path.write_bytes(content)
        assert "damaged, cut short or not an ONNX file" in _refused(path, options=GREY)
    assert "has 2 inputs" in _refused(_onnx(path, inputs=2), options=GREY)
    free = dataclasses.replace(GREY, input_shape=None)
    assert "give --input-shape" in _refused(_onnx(path, ["n", 1, "h", "w"]), options=free)
    assert "no such file" in _refused(tmp_path / "none.onnx")
