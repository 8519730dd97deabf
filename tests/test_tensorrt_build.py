"""The builder script of a bundle, against a FAKE tensorrt (tests/fakes): what it asks for, and what it refuses."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from fakes import fake_tensorrt
from onnx import TensorProto, numpy_helper

from edgegen import bundle_loaders, targets
from edgegen.runtimes import tensorrt
from edgegen.types import Graph, PrecisionPlan, Target, TensorSpec

GIB = 2**30
INT8 = PrecisionPlan("int8", "s8s8", rest="fp16")
NAMES = ["0/Conv", "1.conv1/Conv", "1.conv2/Conv", "2.conv1/Conv", "2.conv2/Conv", "3/Conv"]
TEXTS = {"int8": "Thirty-two wide channel vectorized row major Int8 format", "fp16": "Row major linear FP16 format",
         "fp32": "Row major linear FP32"}  # fmt: skip
TYPES = {"int8": "Int8", "fp16": "Half", "fp32": "Float"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Built folders of a net with two residual sums: INT8 and FP16 for TensorRT 10, INT8 for TensorRT 8; 2:4 zeros."""
    folder = tmp_path_factory.mktemp("built")
    np.save(folder / "input.npy", np.random.default_rng(0).random((4, 3, 4, 4), dtype=np.float32))
    onnx.save(residual(), folder / "graph.onnx")
    inputs, outputs = (TensorSpec("input", (1, 3, 4, 4)),), (TensorSpec("output", (1, 3, 4, 4)),)
    graph = Graph("net", folder / "graph.onnx", inputs, outputs)

    def made(name: str, plan: PrecisionPlan, target: Target) -> Path:
        chosen = dataclasses.replace(graph, plan=plan)
        return tensorrt.build(chosen, folder / name, calibration=folder, target=target).path.parent

    orin, xavier = targets.load("jetson-orin-nano"), targets.load("jetson-xavier-nx")
    found = {"int8": made("int8", INT8, orin), "fp16": made("fp16", PrecisionPlan("fp16"), orin),
             "old": made("old", INT8, xavier)}  # fmt: skip
    onnx.save(residual(zeros=True), folder / "graph.onnx")
    return found | {"sparse": made("sparse", INT8, orin), "sparse on Volta": made("volta", INT8, xavier)}


def residual(zeros: bool = False) -> onnx.ModelProto:
    """0, then twice x + conv2(relu(conv1(x))), then 3; made by hand, so that no torch is needed.

    zeros: two weights of every four along the inputs are zero, where there are four (0 has three inputs).
    """
    rng, nodes, weights, last = np.random.default_rng(0), [], [], "input"

    def conv(name: str, source: str, made: str, channels: tuple[int, int]) -> str:
        weight = rng.standard_normal((*channels, 1, 1)).astype(np.float32)
        if zeros:
            weight[:, ::4] = weight[:, 3::4] = 0
        weights.append(numpy_helper.from_array(weight, f"{name}.w"))
        nodes.append(oh.make_node("Conv", [source, f"{name}.w"], [made], f"{name}/Conv"))
        return made

    last = conv("0", last, "a0", (8, 3))
    for block in "12":
        inner = conv(f"{block}.conv1", last, f"b{block}", (8, 8))
        nodes.append(oh.make_node("Relu", [inner], [f"c{block}"], f"{block}/Relu"))
        inner = conv(f"{block}.conv2", f"c{block}", f"d{block}", (8, 8))
        nodes.append(oh.make_node("Add", [last, inner], [f"a{block}"], f"{block}/Add"))
        last = f"a{block}"
    conv("3", last, "output", (3, 8))
    ends = [oh.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, 4, 4)) for name in ("input", "output")]
    graph = oh.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


Script = Callable[..., tuple[ModuleType, Path]]


@pytest.fixture
def script(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """script(folder name): the builder as a module of a copied folder, with the fake, 4 GiB free, sm 8.7, no Jetson."""

    def opened(kind: str = "int8", free: int = 4 * GIB) -> tuple[ModuleType, Path]:
        folder = tmp_path / kind
        if not folder.exists():
            shutil.copytree(folders[kind], folder)
        spec = importlib.util.spec_from_file_location("build_engine", folder / "build_engine.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "cuda", lambda: {"free": free, "total": 8 * GIB, "capability": "8.7"})
        monkeypatch.setattr(module, "l4t", lambda: "36.4.3")
        return module, folder

    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    fake_tensorrt.state.reset()
    fake_tensorrt.version("10.3.0")
    fake_tensorrt.state.layers = lambda: layers("int8")
    yield opened
    fake_tensorrt.version("10.3.0")
    fake_tensorrt.state.reset()


def layers(
    precision: str, *, newer: bool = False, without: tuple[str, ...] = (), wide: tuple[str, ...] = ()
) -> list[Any]:
    """The inspector's layers of an engine: a reformat, then every convolution fused with what follows it."""
    made = [{"Name": "Reformatting CopyNode for Input Tensor 0 to 0/Conv + 0/Relu", "LayerType": "Reformat",
             "Inputs": [tensor("fp32", newer)], "Outputs": [tensor(precision, newer)]}]  # fmt: skip
    for i, name in enumerate(NAMES):
        got = "fp32" if name in wide else precision
        fused = f"{name} + {name}/Relu" if i % 2 else f"__myl_Conv_{i}"  # 8.x names nodes, 10.x puts them in Metadata
        made.append({
            "Name": f"weight + {fused}", "LayerType": "CaskConvolution", "Inputs": [tensor(got, newer)],
            "Outputs": [tensor("fp16", newer)], "TacticName": "sm80_xmma_fprop",
            "Metadata": "" if i % 2 else f"[ONNX Layer: {name}]\x1e[ONNX Layer: {name}/Relu]",
        })  # fmt: skip
    return [layer for layer in made if not any(name in str(layer) for name in without)]


def tensor(precision: str, newer: bool) -> dict[str, Any]:
    if newer:  # 11.x tells format and type apart
        return {"Name": "t", "Format": "Row major linear", "DataType": TYPES[precision]}
    return {"Name": "t", "Location": "Device", "Dimensions": [1, 3], "Format/Datatype": TEXTS[precision]}


def test_the_script_is_plain_python_of_its_own() -> None:
    """Python 3.6 of JetPack 4.6 can read it, and it imports the standard library only."""
    text = Path(tensorrt.__file__).with_name("_tensorrt_build.py").read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 6))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names
    assert "__future__" not in names  # 3.7


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1", "11.4.1"])
def test_an_engine_is_built_and_read_back(version: str, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    """One file for 10.x, with `Bindings`, and 11.x, with `I/O Tensors`."""
    module, folder = script()
    fake_tensorrt.version(version)
    fake_tensorrt.state.layers = lambda: layers("int8", newer=version.startswith("11"))
    module.main([])
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["layer", "promised", "obtained"]
    assert [line.split() for line in told[1:-1]] == [[name, "int8", "int8"] for name in NAMES]
    assert told[-1] == str(folder / "model.engine")
    record = json.loads((folder / "model.engine.json").read_text())
    assert record["layers"] == dict.fromkeys(NAMES, "int8")
    assert record["identity"] == {
        "TensorRT": version, "compute capability": "8.7", "Jetson Linux": "36.4.3", "flags": "int8, typed",
        "ONNX file": json.loads((folder / "build.json").read_text())["sha256"],
    }  # fmt: skip
    assert fake_tensorrt.state.network_flags == [0 if version.startswith("11") else 2]  # 1 << STRONGLY_TYPED
    assert fake_tensorrt.state.flags == []
    assert fake_tensorrt.state.workspaces == [3 * GIB]
    assert (folder / "timing.cache").read_bytes() == b"+"


def test_tensorrt_8_gets_flags_and_its_own_workspace_setting(script: Script) -> None:
    module, folder = script("old")
    fake_tensorrt.version("8.2.1.8")
    module.main([])
    assert fake_tensorrt.state.network_flags == [1]  # 1 << EXPLICIT_BATCH
    assert fake_tensorrt.state.flags == ["FP16", "INT8"]
    assert fake_tensorrt.state.workspaces == [3 * GIB]
    assert json.loads((folder / "model.engine.json").read_text())["identity"]["flags"] == "int8, flags"


@pytest.mark.parametrize(
    ("kind", "got", "message"),
    [
        ("int8", "fp32", "promised int8, not obtained for 6 of 6 layers"),
        ("int8", "fp16", "promised int8, not obtained for 6 of 6 layers"),
        ("fp16", "fp32", "promised fp16, not obtained for 6 of 6 layers"),
    ],
)
@pytest.mark.parametrize("version", ["10.3.0", "11.4.1"])
def test_a_wider_engine_fails_with_a_table(
    kind: str, got: str, message: str, version: str, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    module, folder = script(kind)
    fake_tensorrt.version(version)
    fake_tensorrt.state.layers = lambda: layers(got, newer=version.startswith("11"))
    with pytest.raises(SystemExit, match=message):
        module.main([])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [[name, kind, got] for name in NAMES]
    assert not (folder / "model.engine").exists()
    module.main(["--accept-wider"])
    assert (folder / "model.engine").exists()


def test_one_wide_layer_is_enough_when_the_file_is_typed_and_not_on_tensorrt_8(script: Script) -> None:
    fake_tensorrt.state.layers = lambda: layers("int8", wide=("2.conv1/Conv",))
    module, _ = script()
    with pytest.raises(SystemExit, match="promised int8, not obtained for 1 of 6 layers"):
        module.main([])
    fake_tensorrt.version("8.5.2.2")
    script("old")[0].main([])
    fake_tensorrt.state.layers = lambda: layers("int8", wide=tuple(NAMES[:3]))
    with pytest.raises(SystemExit, match="not obtained for 3 of 6"):
        script("old")[0].main(["--rebuild"])


def test_layers_that_the_engine_does_not_name_are_told(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    module, _ = script()
    fake_tensorrt.state.layers = lambda: layers("int8", without=("3/Conv",))
    module.main([])
    assert "3/Conv" in (line := capsys.readouterr().out.splitlines()[-2]) and line.endswith("not named by the engine")
    fake_tensorrt.state.layers = lambda: [{"Name": "all of it", "LayerType": "kgen", "Inputs": [tensor("fp16", False)]}]
    with pytest.raises(SystemExit, match="promised int8, not obtained"):
        module.main(["--rebuild"])
    fake_tensorrt.state.layers = lambda: [{"Name": "all of it", "Inputs": [tensor("int8", False)]}]
    module.main(["--rebuild"])
    assert "names no layer of the file; its layers are: int8" in capsys.readouterr().out


def test_an_engine_is_kept_as_long_as_nothing_changed(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    module, _ = script()
    module.main([])
    module.main([])
    assert fake_tensorrt.state.builds == 1
    assert "model.engine is of this device and is kept" in capsys.readouterr().out
    module.main(["--rebuild"])
    assert fake_tensorrt.state.builds == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda module, patch: fake_tensorrt.version("10.7.0"), "TensorRT was 10.3.0, is 10.7.0"),
        (lambda module, patch: patch.setattr(module, "l4t", lambda: "36.5.0"), "Jetson Linux was 36.4.3, is 36.5.0"),
        (lambda module, patch: patch.setattr(module, "cuda", lambda: {"free": GIB, "capability": "7.2"}),
         "compute capability was 8.7, is 7.2"),
        (lambda module, patch: Path(module.HERE, "model.engine.json").unlink(), "nothing says what it was built for"),
        (lambda module, patch: Path(module.HERE, "model.engine").write_bytes(b"cut off"), "it cannot be loaded"),
    ],
)  # fmt: skip
def test_an_old_engine_is_rebuilt_with_one_sentence(
    change: Callable[[Any, pytest.MonkeyPatch], Any], sentence: str, script: Script, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    module, _ = script()
    module.main([])
    change(module, monkeypatch)
    module.main([])
    assert f"rebuilding model.engine: {sentence}\n" in capsys.readouterr().out
    assert fake_tensorrt.state.builds == 2


def test_another_onnx_file_is_not_built(script: Script) -> None:
    module, folder = script()
    (folder / "model.onnx").write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"model.onnx is not the file that build.json was made for"):
        module.main([])


def test_without_memory_it_is_tried_with_less(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    module, folder = script()
    fake_tensorrt.state.fails = ["[defaultAllocator.cpp] Cuda Runtime (out of memory)", "OutOfMemory (no further info)"]
    module.main([])
    assert fake_tensorrt.state.workspaces == [3 * GIB, 3 * GIB // 2, 3 * GIB // 4]
    assert "not enough memory to build with a workspace of 3072 MiB" in capsys.readouterr().out
    assert (folder / "model.engine").exists()
    fake_tensorrt.state.fails = ["Cuda Runtime (out of memory)"] * 4
    with pytest.raises(SystemExit, match="out of memory at every size: stop other programs"):
        module.main(["--rebuild"])
    assert fake_tensorrt.state.efforts[-1] == 1  # the last try also tries fewer kernels


def test_other_failures_are_not_tried_again(script: Script) -> None:
    module, _ = script()
    fake_tensorrt.state.fails = ["Could not find any implementation for node 0/Conv"]
    with pytest.raises(SystemExit, match="TensorRT built no engine: Could not find any implementation for node 0/Conv"):
        module.main([])
    assert fake_tensorrt.state.builds == 1
    fake_tensorrt.state.parser_error = "In node 3 (parseNode): UNSUPPORTED_NODE"
    with pytest.raises(SystemExit, match=r"TensorRT 10.3.0 does not take model.onnx, made for 10.3: In node 3"):
        module.main([])


@pytest.mark.parametrize(
    ("free", "asked", "bytes_"),
    [(4 * GIB, [], 3 * GIB), (GIB // 2, [], GIB // 4), (10, [], 16 * 2**20), (4 * GIB, ["--workspace", "64"], 2**26)],
)
def test_the_workspace_leaves_room(free: int, asked: list[str], bytes_: int, script: Script) -> None:
    script(free=free)[0].main(asked)
    assert fake_tensorrt.state.workspaces[0] == bytes_


def test_without_cuda_s_library_tensorrt_chooses(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _ = script()
    monkeypatch.setattr(module, "cuda", lambda: None)
    module.main([])
    assert fake_tensorrt.state.workspaces == []
    assert "libcudart was not found" in capsys.readouterr().out


def test_free_memory_comes_from_cuda(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = script()
    spec = importlib.util.spec_from_file_location("fresh", Path(module.HERE, "build_engine.py"))
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)

    class Library:
        status = 0

        def cudaMemGetInfo(self, free: Any, total: Any) -> int:
            free._obj.value, total._obj.value = 5, 7
            return self.status

        def cudaDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
            value._obj.value = {75: 8, 76: 7}[attribute]
            return 0

    def opened(name: str) -> Library:
        if name != "libcudart.so.12":
            raise OSError(name)
        return Library()

    monkeypatch.setattr(ctypes, "CDLL", opened)
    assert fresh.cuda() == {"free": 5, "total": 7, "capability": "8.7"}
    monkeypatch.setattr(Library, "status", 100)
    with pytest.raises(SystemExit, match="CUDA answers with error 100"):
        fresh.cuda()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert fresh.cuda() is None


def test_a_timing_cache_is_used_again_and_a_foreign_one_is_not(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    module, folder = script()
    module.main([])
    module.main(["--rebuild"])
    assert fake_tensorrt.state.caches == [b"", b"+"]
    fake_tensorrt.state.refuses_cache = True
    module.main(["--rebuild"])
    assert "timing.cache is of another TensorRT or GPU" in capsys.readouterr().out
    assert (folder / "timing.cache").read_bytes() == b"+"


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        ("libnvdla_compiler.so: cannot open shared object file", "apt-get install nvidia-l4t-dla-compiler"),
        ("No module named 'tensorrt'", "python3-libnvinfer"),
    ],
)
def test_a_missing_library_comes_with_its_cure(error: str, cure: str, script: Script, monkeypatch: Any) -> None:
    module, _ = script()

    def failing(name: str) -> None:
        raise ImportError(error)

    monkeypatch.setattr(module.importlib, "import_module", failing)
    with pytest.raises(SystemExit, match=cure) as told:
        module.main([])
    assert "\n" not in str(told.value)


def test_names_only_are_not_a_read_back(script: Script, tmp_path: Path) -> None:
    module, _ = script()
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({"Layers": ["0/Conv"], "Bindings": ["input"]}))
    with pytest.raises(SystemExit, match="detailed profiling verbosity"):
        module.main(["--check", str(file)])


def test_the_script_runs_alone_in_a_process_of_its_own(script: Script, tmp_path: Path) -> None:
    """`python3 -S -I`: no site packages, so nothing but the standard library and the (fake) tensorrt."""
    _, folder = script()
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(Path(fake_tensorrt.__file__).parent)!r})\n"
        "import fake_tensorrt; sys.modules['tensorrt'] = fake_tensorrt\n"
        "import ctypes\n"
        "def absent(name): raise OSError(name)\n"
        "ctypes.CDLL = absent\n"
        f"sys.argv = [{str(folder / 'build_engine.py')!r}]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1  # the fake's engine has no layers
    assert "the inspector tells no layers" in done.stderr
    assert "libcudart was not found" in done.stdout


TRTEXEC = """#!/bin/sh
case $1 in --help) echo "{help}"; exit 0;; esac
echo "$@" > args
for option in "$@"; do case $option in --exportLayerInfo=*) cp "$LAYERS" "${{option#*=}}";; esac; done
"""


@pytest.mark.parametrize("kind", ["sparse", "int8", "sparse on Volta"])
def test_sparse_kernels_are_tried_where_the_weights_and_the_gpu_have_two_zeros_of_four(
    kind: str, script: Script
) -> None:
    module, folder = script(kind)
    asked = kind == "sparse"
    if "Volta" in kind:
        fake_tensorrt.version("8.2.1.8")
    module.main([])
    assert json.loads((folder / "build.json").read_text())["sparse"] == (NAMES[1:] if asked else [])
    assert ("SPARSE_WEIGHTS" in fake_tensorrt.state.flags) is asked
    assert ("--sparsity=enable" in (folder / "build_engine.sh").read_text()) is asked
    flags = json.loads((folder / "model.engine.json").read_text())["identity"]["flags"]
    assert flags.endswith(", sparse") is asked


@pytest.mark.parametrize(
    ("kind", "help_", "given", "absent"),
    [
        ("int8", "--stronglyTyped --memPoolSize", ("--stronglyTyped", "--memPoolSize=workspace:"), ("--int8",)),
        ("int8", "--memPoolSize", ("--memPoolSize=workspace:",), ("--stronglyTyped", "--int8")),
        ("old", "--workspace", ("--fp16", "--int8", "--workspace="), ("--stronglyTyped", "--memPoolSize")),
    ],
    ids=["10.x", "11.x", "8.2"],
)
def test_trtexec_is_given_what_it_knows_and_read_back(
    kind: str, help_: str, given: tuple[str, ...], absent: tuple[str, ...], script: Script, tmp_path: Path
) -> None:
    _, folder = script(kind)
    tool = tmp_path / "trtexec"
    tool.write_text(TRTEXEC.format(help=help_))
    tool.chmod(0o755)
    exported = tmp_path / "exported.json"
    exported.write_text(json.dumps({"Layers": layers("int8"), "Bindings": ["input"]}))
    environment = {"PATH": os.environ["PATH"], "TRTEXEC": str(tool), "LAYERS": str(exported)}
    command = ["sh", str(folder / "build_engine.sh"), "--iterations=3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    arguments = (folder / "args").read_text().split()
    for start in ("--onnx=model.onnx", "--timingCacheFile=", "--profilingVerbosity=detailed", "--iterations=3", *given):
        assert [a for a in arguments if a.startswith(start)], (start, arguments)
    assert not [a for a in arguments if a.startswith(absent)]
    exported.write_text(json.dumps({"Layers": layers("fp32"), "Bindings": ["input"]}))
    wide = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert wide.returncode == 1
    assert "promised int8, not obtained" in wide.stderr


class Cudart:
    """A FAKE CUDA runtime: device memory is host memory. Arrays are kept alive in `held`."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def cudaMalloc(self, pointer: Any, size: Any) -> int:
        self.held.append(ctypes.create_string_buffer(size.value))
        pointer._obj.value = ctypes.addressof(self.held[-1])
        return 0

    def cudaMemcpy(self, to: Any, source: Any, size: Any, kind: int) -> int:
        ctypes.memmove(to, source, size.value)
        return 0

    def cudaDeviceSynchronize(self) -> int:
        return 0


@pytest.mark.parametrize("version", ["8.2.1.8", "8.5.2.2", "10.3.0", "11.4.1"])
def test_the_sample_of_a_bundle_runs_the_engine(version: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake engine doubles its input; the sample moves the arrays with the CUDA runtime alone."""
    fake_tensorrt.version(version)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Cudart())
    module, folder = script("old" if version.startswith("8") else "int8")
    code: dict[str, Any] = {"HERE": folder, "np": np}
    part = {"file": "model.onnx", "inputs": ["input"], "outputs": ["output"]}
    exec(bundle_loaders.loader("tensorrt"), code)
    with pytest.raises(SystemExit, match="no engine yet: run python3"):
        code["load"](part)
    fake_tensorrt.state.shapes = {"input": (1, 3, 4, 4), "output": (1, 3, 4, 4)}
    module.main([])
    image = np.random.default_rng(0).random((1, 3, 4, 4), dtype=np.float32)
    run = code["load"](part)
    assert np.array_equal(run({"input": image})["output"], 2 * image)
    assert np.array_equal(run({"input": 1 - image})["output"], 2 * (1 - image))
    fake_tensorrt.version("10.9.0")
    with pytest.raises(SystemExit, match=r"TensorRT 10.9.0 cannot load .*model.engine: run python3"):
        code["load"](part)
