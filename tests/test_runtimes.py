"""One contract for every runtime by name, times every plan it offers, times the three tiny models."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import TINY, make_tiny

from edgegen import bundle_samples, errors, files, onnx_graph, program, registry, serial
from edgegen.bundle_loaders import LOADERS
from edgegen.devices import local
from edgegen.runtimes import _common
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Stage, Target, TensorSpec

HERE = Target("here", "", ("onnxruntime", "openvino"), precisions=("fp32", "fp16", "bf16", "int8"), threads=1)
# Largest difference as a fraction of the output's peak: rounding of sums; 8 bits of mantissa; 11 bits in the weights
# alone; 8-bit steps through up to six layers of random weights.
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2, "fp16": 4e-3, "int8": 0.2, "weights": 4e-2}
SAMPLES = 8
SLOW = ("coreml",)  # five seconds a conversion
PACKAGES = {"coreml": "coremltools"}


def offered() -> list[Any]:
    """(runtime, plan) of every runtime; one that is not here is one test, skipped with its reason."""
    cases = []
    for name in registry.names("runtimes"):
        runtime = registry.module("runtimes", name)
        # TensorRT's builds here are ONNX files and scripts: tests/test_tensorrt*.py are about those.
        check = runtime.missing if name == "tensorrt" else getattr(runtime, "cannot_build", runtime.missing)
        if reason := check():
            cases.append(pytest.param(name, PrecisionPlan(), id=name, marks=pytest.mark.skip(reason=reason)))
            continue
        plans = runtime.plans(HERE, local.cpu_flags())
        if name in ("onnxruntime", "openvino"):  # 8 bits, where the target is another machine: wrong on some processors
            plans = _common.exact_sums(plans, dataclasses.replace(HERE, is_host=True), local.cpu_flags())
        marks = [pytest.mark.slow] if name in SLOW else []
        cases += [
            pytest.param(name, plan, id=f"{name}-{plan.label.replace(' ', '_')}", marks=marks) for plan in plans
        ]
    return cases


CASES = offered()
INT8 = [case for case in CASES if case.values[1].precision == "int8"]


@dataclasses.dataclass(frozen=True)
class Exported:
    """A tiny model's graph, calibration folder, one real input, and what torch says to it."""

    graph: Graph
    calibration: Path
    image: np.ndarray
    wanted: np.ndarray


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    import torch

    found = {}
    for name in TINY:
        folder = tmp_path_factory.mktemp(name)
        stage = make_tiny(name).stage
        samples = np.random.default_rng(0).random((SAMPLES, 3, 16, 16), dtype=np.float32)
        np.save(folder / "input.npy", samples)
        with torch.no_grad():
            wanted = stage.module(torch.from_numpy(samples[:1])).numpy()
        found[name] = Exported(both(stage, folder), folder, samples[:1], wanted)
    return found


def both(stage: Stage, folder: Path) -> Graph:
    """The stage as ONNX and as a torch program: some runtimes convert from the one, some from the other."""
    graph = onnx_graph.to_onnx(stage, folder / "graph.onnx")
    return dataclasses.replace(graph, program=program.save(stage, folder / "graph.pt2"))


@pytest.fixture(scope="module")
def built(exported: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """build(runtime, model, plan), each made once."""
    made: dict[Any, Artifact] = {}

    def build(runtime: str, model: str, plan: PrecisionPlan) -> Artifact:
        key = (runtime, model, plan)
        if key not in made:
            made[key] = fresh(runtime, exported[model], plan, tmp_path_factory.mktemp("built") / "out")
        return made[key]

    return build


def fresh(runtime: str, source: Exported, plan: PrecisionPlan, out: Path) -> Artifact:
    graph = dataclasses.replace(source.graph, plan=plan)
    return registry.module("runtimes", runtime).build(graph, out, calibration=source.calibration, target=HERE)


def run(artifact: Artifact, image: np.ndarray) -> np.ndarray:
    with registry.module("runtimes", artifact.runtime).load(artifact) as runner:
        return runner({"input": image})["output"]


def inspect(artifact: Artifact) -> Inspection:
    return registry.module("runtimes", artifact.runtime).inspect(artifact)


def is_close(wanted: np.ndarray, got: np.ndarray, tolerance: float) -> bool:
    """Same shape, and nowhere further apart than `tolerance` of the expected peak."""
    return wanted.shape == got.shape and float(np.abs(wanted - got).max()) <= tolerance * float(np.abs(wanted).max())


@pytest.mark.parametrize("wrong", [lambda x: 2 * x, np.zeros_like, lambda x: x[:, :-1], lambda x: x * np.nan])
def test_comparison_can_fail(wrong: Any) -> None:
    right = np.random.default_rng(0).random((1, 3, 4, 4), dtype=np.float32)
    assert is_close(right, right.copy(), 1e-6)
    assert not is_close(right, wrong(right), max(TOLERANCE.values()))


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize(("runtime", "plan"), CASES)
def test_artifact_answers_as_torch_does(
    runtime: str, plan: PrecisionPlan, model: str, exported: Any, built: Any
) -> None:
    artifact = built(runtime, model, plan)
    first, second = run(artifact, exported[model].image), run(artifact, exported[model].image)
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)
    allowed = TOLERANCE["weights" if plan.weights else plan.precision]
    assert is_close(exported[model].wanted, first, allowed)
    assert not is_close(2 * exported[model].wanted, first, allowed)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize(("runtime", "plan"), CASES)
def test_artifact_describes_itself(runtime: str, plan: PrecisionPlan, model: str, built: Any) -> None:
    artifact = built(runtime, model, plan)
    assert any(file.is_relative_to(artifact.path) for file in artifact.files)  # an .mlpackage is a folder
    twin = getattr(registry.module("runtimes", runtime), "TWIN_FILE", "")  # does not go onto the device
    there = [file for file in artifact.path.parent.rglob("*") if file.is_file() and file.name != twin]
    assert artifact.size_bytes == sum(file.stat().st_size for file in there)
    assert (artifact.runtime, artifact.plan, artifact.options["threads"]) == (runtime, plan, 1)
    assert artifact.versions[PACKAGES.get(runtime, runtime)]


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize(("runtime", "plan"), CASES)
def test_precision_read_back_is_the_promised_one(runtime: str, plan: PrecisionPlan, model: str, built: Any) -> None:
    found = inspect(built(runtime, model, plan))
    weighted = {layer.name for layer in onnx_graph.cost(built("onnxruntime", model, PrecisionPlan()).path).layers}
    assert set(found.layers) == weighted
    got = set(found.layers.values())
    if plan.weights:
        # Core ML names it in its own words, and leaves small weights as they are
        told = {f"{plan.weights} weights, {plan.precision}"} if runtime != "coreml" else {plan.label, plan.precision}
        assert got <= told and got != {plan.precision}
        least, most = (0.1 if runtime == "coreml" else 1.0, 1.0) if plan.weights == "int8" else (0.0, 0.0)
        assert least <= found.int8_weight_share <= most and found.int8_macs_share == 0
    elif plan.precision == "int8":
        assert found.int8_weight_share == 1
        # signed activations: ONNX Runtime on x86 leaves layers in float, which the inspection must tell
        assert got == {"int8"} if not plan.format.startswith("s8") else "int8" in got
        assert found.int8_macs_share == 1 or plan.format.startswith("s8")
    else:
        widened = plan.precision == "fp16" and runtime != "coreml"  # the others compute in FP32 on this processor
        assert got == ({"fp16 weights, fp32"} if widened else {plan.precision})
        assert (found.int8_weight_share, found.int8_macs_share) == (0, 0)


@pytest.mark.parametrize(("runtime", "plan"), CASES)
def test_same_input_same_bytes(runtime: str, plan: PrecisionPlan, exported: Any, built: Any, tmp_path: Path) -> None:
    again = fresh(runtime, exported["residual"], plan, tmp_path / "again")
    first = built(runtime, "residual", plan)
    assert [file.name for file in again.files] == [file.name for file in first.files]
    assert [files.sha256(file) for file in again.files] == [files.sha256(file) for file in first.files]


@pytest.mark.parametrize(("runtime", "plan"), INT8)
def test_kept_layers_are_float(runtime: str, plan: PrecisionPlan, exported: Any, tmp_path: Path) -> None:
    kept = dataclasses.replace(plan, float_layers=("1.conv1/Conv",))
    found = inspect(fresh(runtime, exported["residual"], kept, tmp_path / "out"))
    assert found.layers["1.conv1/Conv"] == plan.rest
    assert 0 < found.int8_weight_share < 1
    assert found.layers["1.conv2/Conv"] == "int8"


@pytest.mark.parametrize(("runtime", "plan"), INT8)
def test_kept_types_are_float(runtime: str, plan: PrecisionPlan, exported: Any, tmp_path: Path) -> None:
    kept = dataclasses.replace(plan, float_types=("Gemm",))
    found = inspect(fresh(runtime, exported["conv_chain"], kept, tmp_path / "out"))
    assert {name for name, got in found.layers.items() if name.endswith("Gemm") and got == plan.rest} == {"10/Gemm"}


@pytest.mark.parametrize(("runtime", "plan"), INT8)
def test_linear_layers_of_a_transformer_run_in_int8(runtime: str, plan: PrecisionPlan, tmp_path: Path) -> None:
    """ONNX Runtime's MatMulAddFusion would put each linear layer with a bias back into float."""
    import torch
    from torch import nn

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.act, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)

        def forward(self, x: Any) -> Any:
            return x + self.down(self.act(self.up(self.norm(x))))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Mlp().eval()
    samples = np.random.default_rng(0).standard_normal((SAMPLES, 9, 16)).astype(np.float32)
    np.save(tmp_path / "input.npy", samples)
    stage = Stage("mlp", module, (TensorSpec("input", (1, 9, 16)),), (TensorSpec("output", (1, 9, 16)),))
    graph = both(stage, tmp_path)
    with torch.no_grad():
        wanted = module(torch.from_numpy(samples[:1])).numpy()
    artifact = fresh(runtime, Exported(graph, tmp_path, samples[:1], wanted), plan, tmp_path / "out")
    assert inspect(artifact).layers == {"up/MatMul": "int8", "down/MatMul": "int8"}
    assert is_close(wanted, run(artifact, samples[:1]), TOLERANCE["int8"])


@pytest.mark.parametrize(("runtime", "plan"), INT8)
def test_all_layers_kept_is_a_failure(runtime: str, plan: PrecisionPlan, exported: Any, tmp_path: Path) -> None:
    kept = dataclasses.replace(plan, float_types=("Conv", "Gemm", "MatMul"))
    with pytest.raises(errors.RuntimeFailed, match=r"int8"):
        fresh(runtime, exported["conv_chain"], kept, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("runtime", "plan"), INT8)
def test_bad_requests_are_one_line_and_leave_nothing(
    runtime: str, plan: PrecisionPlan, exported: Any, tmp_path: Path
) -> None:
    source, out = exported["residual"], tmp_path / "out"
    unknown = dataclasses.replace(plan, float_layers=("1.conv1/Con",))
    with pytest.raises(errors.UsageError, match=r"unknown layer '1.conv1/Con', did you mean '1.conv1/Conv'\?"):
        fresh(runtime, source, unknown, out)
    module = registry.module("runtimes", runtime)
    with pytest.raises(errors.UsageError, match="needs calibration data"):
        module.build(dataclasses.replace(source.graph, plan=plan), out, calibration=None, target=HERE)
    with pytest.raises(errors.DataError, match=r"input\.npy: not a readable calibration file"):
        fresh(runtime, dataclasses.replace(source, calibration=tmp_path), plan, out)
    np.save(tmp_path / "input.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(errors.DataError, match="not a readable calibration file"):
        fresh(runtime, dataclasses.replace(source, calibration=tmp_path), plan, out)
    np.save(tmp_path / "input.npy", np.zeros((4, 3, 8, 8), np.float32))
    with pytest.raises(errors.DataError, match=r"samples have shape \(3, 8, 8\), input 'input' takes \(3, 16, 16\)"):
        fresh(runtime, dataclasses.replace(source, calibration=tmp_path), plan, out)
    np.save(tmp_path / "input.npy", np.full((4, 3, 16, 16), np.nan, np.float32))
    with pytest.raises(errors.DataError, match="not finite"):
        fresh(runtime, dataclasses.replace(source, calibration=tmp_path), plan, out)
    assert [file.name for file in tmp_path.iterdir()] == ["input.npy"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_unknown_plan_is_refused_with_the_known_ones(runtime: str, exported: Any, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match=rf"{runtime} cannot build int8 \(u4s4.*it can build: fp32"):
        fresh(runtime, exported["residual"], PrecisionPlan("int8", "u4s4"), tmp_path / "out")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_plans_keep_to_the_precisions_of_the_target(runtime: str) -> None:
    module, flags = registry.module("runtimes", runtime), frozenset({"avx512_bf16"})
    only = dataclasses.replace(HERE, precisions=("fp32",))
    assert module.plans(only, flags) == (PrecisionPlan("fp32"),)
    for plan in module.plans(dataclasses.replace(HERE, precisions=("fp32", "int8")), flags):
        assert {plan.precision, plan.rest} <= {"fp32", "int8"}


def test_bf16_is_offered_where_the_processor_has_it() -> None:
    plans = registry.module("runtimes", "openvino").plans
    assert any(plan.precision == "bf16" for plan in plans(HERE, frozenset({"amx_bf16"})))
    assert not any("bf16" in (plan.precision, plan.rest) for plan in plans(HERE, frozenset({"avx2"})))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_supports_names_the_operation_that_is_missing(runtime: str, exported: Any, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    module = registry.module("runtimes", runtime)
    assert module.supports(exported["residual"].graph, HERE) == []
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 3]) for n in ("input", "output")]
    node = onnx.helper.make_node("Frobnicate", ["input"], ["output"], name="odd", domain="nowhere")
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("nowhere", 1)]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "odd.onnx")
    odd = Graph("odd", tmp_path / "odd.onnx", (TensorSpec("input", (1, 3)),), (TensorSpec("output", (1, 3)),))
    assert [problem for problem in module.supports(odd, HERE) if "Frobnicate" in problem.op]


@pytest.mark.parametrize(("runtime", "plan"), CASES)
def test_damaged_artifact_fails_by_name(runtime: str, plan: PrecisionPlan, built: Any, tmp_path: Path) -> None:
    artifact = built(runtime, "conv_chain", plan)
    broken = Path(shutil.copytree(artifact.path.parent, tmp_path / "broken")) / artifact.path.name
    largest = max((f for f in (broken, *broken.rglob("*")) if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with (
        pytest.raises(errors.RuntimeFailed, match=f"{runtime} .*cannot load"),
        registry.module("runtimes", runtime).load(dataclasses.replace(artifact, path=broken)),
    ):
        pass


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_wrong_feed_fails_by_name(runtime: str, built: Any) -> None:
    with pytest.raises(errors.RuntimeFailed, match=f"{runtime} fp32"):
        run(built(runtime, "conv_chain", PrecisionPlan()), np.zeros((1, 3, 9, 9), np.float32))


def test_outputs_are_not_overwritten_by_the_next_run(built: Any, exported: Any) -> None:
    for runtime in ("onnxruntime", "openvino"):
        with registry.module("runtimes", runtime).load(built(runtime, "residual", PrecisionPlan())) as runner:
            first = runner({"input": exported["residual"].image})["output"]
            copy = first.copy()
            runner({"input": 1 - exported["residual"].image})
        assert np.array_equal(first, copy)


def test_onnxruntime_has_fp16_where_it_pays_and_says_what_computes(built: Any) -> None:
    module = registry.module("runtimes", "onnxruntime")
    host, pi = (dataclasses.replace(HERE, is_host=here) for here in (True, False))
    offered = [
        "fp16" in {plan.precision for plan in module.plans(target, flags)}
        for target, flags in ((host, frozenset({"avx512f"})), (host, frozenset({"asimdhp"})), (pi, frozenset()))
    ]
    assert offered == [False, True, True]
    half, whole = (built("onnxruntime", "conv_chain", PrecisionPlan(name)) for name in ("fp16", "fp32"))
    assert half.size_bytes < 0.7 * whole.size_bytes
    if not local.cpu_flags() & {"asimdhp"}:
        assert set(module.inspect(half).layers.values()) == {"fp16 weights, fp32"}


def test_nncf_is_silent(exported: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fresh("openvino", exported["conv_chain"], PrecisionPlan("int8"), tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_no_telemetry_is_prepared(tmp_path: Path) -> None:
    """The makers' telemetry writes an identity into the home folder as soon as it is set up; nothing may appear."""
    code = (
        "import sys; from edgegen.runtimes import _ir\n"
        "with _ir.quiet(): import nncf\n"
        "assert sys.modules['openvino_telemetry'] is None and not [m for m in sys.modules if m.startswith('openvino_tel"
        "emetry.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert list(tmp_path.iterdir()) == []


def test_nncf_builds_the_same_without_torch_in_its_process(exported: Any, tmp_path: Path) -> None:
    """A worker that has not imported torch does not import it for nncf, and nncf's file is the same."""
    source = exported["conv_chain"]
    with_torch = fresh("openvino", source, PrecisionPlan("int8"), tmp_path / "with")
    job = {"graph": serial.to_json(dataclasses.replace(source.graph, plan=PrecisionPlan("int8"))),
           "target": serial.to_json(HERE)}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    code = (
        "import json, sys; from pathlib import Path; from edgegen import serial; from edgegen.types import *\n"
        "from edgegen.runtimes import openvino\n"
        "folder, calibration = map(Path, sys.argv[1:]); job = json.loads((folder / 'job.json').read_text())\n"
        "graph, target = serial.from_json(Graph, job['graph']), serial.from_json(Target, job['target'])\n"
        "openvino.build(graph, folder / 'without', calibration=calibration, target=target)\n"
        "assert 'torch' not in sys.modules and 'nncf' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(source.calibration)], check=True)
    for file in with_torch.files:
        assert file.read_bytes() == (tmp_path / "without" / file.name).read_bytes()


@pytest.mark.filterwarnings("ignore")  # executorch and torchao warn at their import; the worker process does not mind
@pytest.mark.parametrize("runtime", [name for name in LOADERS if name != "tensorrt"])
def test_the_sample_script_of_a_bundle_answers_as_the_runtime_does(runtime: str, exported: Any, built: Any) -> None:
    plan = next((case.values[1] for case in CASES if case.values[0] == runtime), None)
    if plan is None or registry.module("runtimes", runtime).missing():
        pytest.skip(f"{runtime} does not run here")
    model = make_tiny("residual")
    artifact = built(runtime, "residual", plan)
    text = bundle_samples.script(model, artifact, artifact.path.name, "here")
    code: dict[str, Any] = {"__name__": "sample", "__file__": str(artifact.path.parent / "run_here.py")}
    exec(compile(text, "run_here.py", "exec"), code)
    found, image = code["called"], exported["residual"].image
    assert np.array_equal(found(image), run(artifact, image))
    assert not np.array_equal(found(1 - image), run(artifact, image))


@pytest.mark.parametrize("name", registry.names("runtimes"))
def test_a_runtime_with_an_app_names_its_folder(name: str) -> None:
    module = registry.module("runtimes", name)
    assert hasattr(module, "project") == isinstance(getattr(module, "PROJECT", None), str)
