"""Every family of timm and every built-in generator, times every runtime: does it export, and is the result right?

    python benchmarks/export_sweep.py [--only NAME ...] [--runtime NAME ...] [--limit SECONDS] [--table]

A cell is a network in a runtime, twice: "plain", the converter call that a user would write by hand, and edgegen.
ok: built, run (in the runtime, or in the twin where it cannot run here), outputs within TOLERANCE of torch's, or in
FP16 within 1.5 times what rounding the weights alone to FP16 changes (`half_weights` of the row).
refused: named operator, layer and cure before any work. wrong: other outputs. failed: an error while building.
crashed: the process died or ran over its limit; the rest of its batch goes on in a new one. Results are written after
each cell to benchmarks/results/export_sweep.jsonl, and a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgegen import registry

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "export_sweep.jsonl"
RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "coreml", "executorch", "litert", "ncnn")
# Built-in models by their defaults, but for those whose defaults are 1024 pixels or a gigabyte of weights.
BUILTIN: dict[str, dict[str, Any]] = {name: {} for name in registry.names("models")} | {
    "stylegan2": {"size": 256}, "mobile_stylegan": {"widths": [512, 512, 512, 512, 512, 256, 128]},
    "fastgan": {"size": 256}, "ugatit": {"light": True},
}  # fmt: skip
# One small member of each family (module of timm.models) at its own input size; those that take longest come last.
TIMM = (
    "botnet26t_256", "repvgg_a0", "cait_xxs24_224", "coat_tiny", "convit_tiny", "convnext_atto", "crossvit_9_240",
    "davit_tiny", "deit_tiny_patch16_224", "densenet121", "dla34", "edgenext_xx_small", "efficientformer_l1",
    "efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224", "fasternet_t0",
    "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050", "hardcorenas_a", "hgnetv2_b0", "hiera_tiny_224",
    "hrnet_w18_small", "inception_next_atto", "inception_v3", "levit_128s", "mambaout_femto", "maxvit_rmlp_pico_rw_256",
    "mixer_s32_224", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobilevit_xxs",
    "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m0_9",
    "res2net50_26w_4s", "resnest14d", "resnet18", "resnetv2_18", "rexnet_100", "selecsls42b", "shvit_s1", "skresnet18",
    "starnet_s1", "swiftformer_xs", "swin_tiny_patch4_window7_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224",
    "visformer_tiny", "vit_tiny_patch16_224", "vovnet39a", "xcit_nano_12_p16_224", "vgg11", "volo_d1_224", "xception41",
    "tresnet_m", "nextvit_small", "twins_svt_small", "sequencer2d_s", "nest_tiny", "mvitv2_tiny", "convmixer_768_32",
    "nfnet_l0", "cspresnet50", "dpn48b",
)  # fmt: skip
# Largest difference to torch as a fraction of the output's peak: FP32, and FP16 where a runtime has nothing wider.
TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2}
Inputs = tuple[Any, ...]
Job = tuple[str, str]  # network, runtime
HALF = ("coreml", "tensorrt")
SECONDS = 600  # a cell
BATCH = 6  # networks that one process does: most of a small cell of its own would be imports


def spec_of(name: str) -> str:
    """What `--model` takes."""
    return name if name in BUILTIN else f"timm:{name}"


def load(name: str) -> tuple[Any, Inputs]:
    """(model, its inputs as tensors); random weights from a seed, norms randomised."""
    import torch

    from edgegen import graph, loading, records

    options = records.ModelOptions(config=BUILTIN.get(name, {}))
    model = loading.load_model(spec_of(name), options=options, latency_only=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.stage.module.parameters():  # heads that start at zero would make every answer right
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.05, generator=generator)
    how = model.preprocessing
    return model, tuple(graph.example_input(spec, generator, preprocessing=how) for spec in model.stage.inputs)


def reference(model: Any, inputs: Inputs) -> Any:
    """torch's own outputs."""
    import torch

    with torch.no_grad():
        return model.stage.module.eval()(*inputs).numpy()


def half_weights(model: Any, inputs: Inputs, wanted: Any) -> float:
    """Difference of torch's own outputs, all else in FP32, when the weights (norms folded, as every build has them) are
    rounded to FP16: no build with these weights need be nearer. Some networks with random weights are that badly
    conditioned (Visformer: scores of a million in a softmax)."""
    import copy

    import torch

    from edgegen.passes import _flow

    rounded = copy.deepcopy(model.stage.module)
    with torch.no_grad():
        _flow.fold(rounded, inputs)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.half().to(parameter.dtype)
    return difference(reference(model.with_module(rounded), inputs), wanted)


def difference(found: Any, wanted: Any) -> float:
    """Largest difference as a fraction of the largest output."""
    import numpy as np

    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found.astype(np.float64) - wanted).max() / max(np.abs(wanted).max(), 1e-12))


# ------------------------------------------------------------------------------------------- by hand, as a user would


def plain_onnxruntime(module: Any, inputs: Inputs, folder: Path) -> Any:
    import onnxruntime
    import torch

    torch.onnx.export(module, inputs, str(folder / "m.onnx"), dynamo=True)
    session = onnxruntime.InferenceSession(str(folder / "m.onnx"))
    return session.run(None, {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs)})[0]


def plain_openvino(module: Any, inputs: Inputs, folder: Path) -> Any:
    import openvino

    compiled = openvino.compile_model(openvino.convert_model(module, example_input=inputs), "CPU",
                                      {"INFERENCE_PRECISION_HINT": "f32"})  # fmt: skip
    return compiled([x.numpy() for x in inputs])[0]


def plain_tensorrt(module: Any, inputs: Inputs, folder: Path) -> Any:
    raise NotImplementedError("TensorRT is not here")


def plain_coreml(module: Any, inputs: Inputs, folder: Path) -> Any:
    import coremltools
    import torch

    traced = torch.jit.trace(module, inputs)
    made = coremltools.convert(traced, inputs=[coremltools.TensorType(shape=x.shape) for x in inputs])
    made.save(str(folder / "m.mlpackage"))
    return None  # it cannot run here


def plain_executorch(module: Any, inputs: Inputs, folder: Path) -> Any:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = to_edge_transform_and_lower(torch.export.export(module, inputs), partitioner=[XnnpackPartitioner()])
    (folder / "m.pte").write_bytes(program.to_executorch().buffer)
    method = Runtime.get().load_program(str(folder / "m.pte")).load_method("forward")
    return method.execute(list(inputs))[0].numpy()


def plain_litert(module: Any, inputs: Inputs, folder: Path) -> Any:
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    litert_torch.convert(module, inputs).export(str(folder / "m.tflite"))
    interpreter = Interpreter(model_path=str(folder / "m.tflite"))
    interpreter.allocate_tensors()
    for given, x in zip(sorted(interpreter.get_input_details(), key=lambda given: given["name"]), inputs):
        interpreter.set_tensor(given["index"], x.numpy())
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def plain_ncnn(module: Any, inputs: Inputs, folder: Path) -> Any:
    import ncnn
    import numpy as np
    import pnnx

    pnnx.export(module, str(folder / "m.pt"), inputs)
    net = ncnn.Net()
    net.load_param(str(folder / "m.ncnn.param"))
    net.load_model(str(folder / "m.ncnn.bin"))
    with net.create_extractor() as run:
        for number, x in enumerate(inputs):
            run.input(f"in{number}", ncnn.Mat(x[0].numpy() if x.dim() > 1 else x.numpy()).clone())
        return np.array(run.extract("out0")[1])[None]


def plain(model: Any, inputs: Inputs, wanted: Any, runtimes: list[str]) -> Iterator[dict[str, Any]]:
    """Status of the converter call by hand, runtime after runtime."""
    for runtime in runtimes:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = globals()[f"plain_{runtime}"](model.stage.module, inputs, Path(folder))
            except Exception as error:  # noqa: BLE001 - whatever a converter raises is the result
                told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                yield {"status": "failed", "why": told}
                continue
        if found is None:
            yield {"status": "ok", "why": "converted; cannot be run here"}
        else:
            yield judged(difference(found, wanted), "fp32")


def judged(error: float, precision: str) -> dict[str, Any]:
    """ok or wrong by the difference to torch."""
    return {"status": "ok" if error <= TOLERANCE[precision] else "wrong", "difference": error}


# ---------------------------------------------------------------------------------------------------------- edgegen


def ours(model: Any, inputs: Inputs, wanted: Any, runtimes: list[str], held: Held) -> Iterator[dict[str, Any]]:
    """Status of edgegen's export, runtime after runtime: cures first, then build and run in worker processes."""
    from edgegen import errors, onnx_graph, program, registry

    with tempfile.TemporaryDirectory() as scratch:
        folder, why = Path(scratch), ""
        try:
            graph = onnx_graph.to_onnx(model.stage, folder / "m.onnx")
            if any(getattr(registry.module("runtimes", name), "NEEDS_PROGRAM", False) for name in runtimes):
                graph = dataclasses.replace(graph, program=program.save(model.stage, folder / "m.pt2"))
        except errors.EdgegenError as error:
            why = str(error)
        for runtime in runtimes:
            if why:
                yield {"status": "failed", "why": why[:300]}
                continue
            found = one(graph, inputs, wanted, runtime, folder, "fp16" if runtime in HALF else "fp32", held)
            if "FP16 ends at" in found.get("why", ""):  # as compress does, which tries both
                found = one(graph, inputs, wanted, runtime, folder, "fp32", held) | {"rewrites": ["fp32"]}
            if found["status"] == "wrong" and runtime in HALF:
                found["half_weights"] = half_weights(model, inputs, wanted)
                found["status"] = "ok" if found["difference"] <= 1.5 * found["half_weights"] else "wrong"
            yield found


class Held:
    """A worker process a runtime, kept over the networks of a batch; a new one where it dies."""

    def __init__(self) -> None:
        self.processes: dict[str, Any] = {}

    def built_and_run(self, graph: Any, out: Path, runtime: str, target: Any, feeds: dict[str, Any]) -> Any:
        """The first output of the build."""
        import numpy as np

        from edgegen import errors, isolation, serial

        module, samples = f"edgegen.runtimes.{runtime}", out.parent / "samples"
        if runtime not in self.processes:
            self.processes[runtime] = isolation.Process(runtime, isolation.Limits(seconds=SECONDS))
        process = self.processes[runtime]
        try:
            made = process.request("build", module=module, graph=serial.to_json(graph), out=str(out),
                                   calibration=str(samples) if graph.plan.precision == "fp16" else None,
                                   target=serial.to_json(target))  # fmt: skip
            process.request("open", module=module, artifact=made["artifact"])
            given = {name: str(samples / f"{name}.npy") for name in feeds}
            found = process.request("run", feeds=given, folder=str(out.parent))["outputs"]
        except errors.Unsupported:
            raise
        except errors.EdgegenError:
            self.processes.pop(runtime).kill()
            raise
        return np.load(next(iter(found.values())), allow_pickle=False)

    def close(self) -> None:
        """End them."""
        while self.processes:
            self.processes.popitem()[1].close()


def one(
    graph: Any, inputs: Inputs, wanted: Any, runtime: str, folder: Path, precision: str, held: Held
) -> dict[str, Any]:
    """One cell of edgegen."""
    import numpy as np

    from edgegen import errors, rewriting
    from edgegen.types import PrecisionPlan, Target

    target = Target("sweep", "", (runtime,), precisions=("fp32", "fp16"), threads=2)
    graph = dataclasses.replace(graph, plan=PrecisionPlan(precision))
    feeds = {given.name: x.numpy() for given, x in zip(graph.inputs, inputs)}
    out, samples = folder / f"{runtime}-{precision}", folder / "samples"
    samples.mkdir(exist_ok=True)
    for name, value in feeds.items():  # what an FP16 build looks at: see fp16_lint
        np.save(samples / f"{name}.npy", value, allow_pickle=False)
    rewrites: list[str] = []
    try:
        try:  # as compress does: what the runtime refuses is rewritten as far as there are cures
            found = held.built_and_run(graph, out, runtime, target, feeds)
        except errors.Unsupported:
            cured = rewriting.cures(graph, runtime, target, feeds=feeds, out=folder / f"{runtime}.onnx")
            rewrites = sorted(cured.changed)
            if cured.problems:
                told = [dataclasses.asdict(problem) for problem in cured.problems]
                return {"status": "refused", "problems": told, "rewrites": rewrites}
            found = held.built_and_run(cured.graph, out, runtime, target, feeds)
    except errors.EdgegenError as error:
        status = "crashed" if "crashed" in str(error) or "signal" in str(error) else "failed"
        return {"status": status, "why": " ".join(str(error).split())[:300]}
    return {**judged(difference(found, wanted), precision), "rewrites": rewrites}


# ------------------------------------------------------------------------------------------------------------ sweep


def isolated(how: str, jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Every cell's try as soon as it is done; where the process dies, that cell crashed; the rest gets a new one."""
    left = list(jobs)
    for job in [job for job in left if how == "plain" and job[1] == "tensorrt"]:
        left.remove(job)
        yield job, {"status": "not here", "why": "TensorRT cannot be installed here", "seconds": 0.0}
    while left:
        begun = time.monotonic()
        with tempfile.TemporaryFile("w+") as words:
            command = [sys.executable, "-W", "ignore", __file__, "--batch", how, *(":".join(job) for job in left)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, cwd=ROOT)
            for line in answers(process):
                yield left.pop(0), json.loads(line)
                begun = time.monotonic()
            late = process.poll() is None
            process.kill()
            code = process.wait()
            words.seek(0)
            last = (words.read().strip().splitlines() or ["no output"])[-1][:300]
        if left:
            why = f"no end after {SECONDS} s" if late else signal.Signals(-code).name if code < 0 else last
            yield left.pop(0), {"status": "crashed", "why": why, "seconds": round(time.monotonic() - begun, 1)}


def answers(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Its lines of results; ends when it ends, or when nothing came for `SECONDS`."""
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            if line.startswith(b'{"status"'):
                lines.put(line)
        process.wait()
        lines.put(b"")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=SECONDS)
        except queue.Empty:
            return
        if not line:
            return
        yield line


def tried(how: str, jobs: list[Job]) -> None:
    """What a process of `isolated` does: a JSON line for each job, as soon as it is done; networks load once."""
    held = Held()
    for name in dict.fromkeys(name for name, _ in jobs):
        model, inputs = load(name)
        wanted = reference(model, inputs)
        if not wanted.std() > 0:
            raise ValueError(f"{name}: the output is the same everywhere: nothing can be checked with it")
        started = time.monotonic()
        runtimes = [runtime for other, runtime in jobs if other == name]
        made = plain(model, inputs, wanted, runtimes) if how == "plain" else ours(model, inputs, wanted, runtimes, held)
        for result in made:
            seconds, started = time.monotonic() - started, time.monotonic()
            print("\n" + json.dumps({**result, "seconds": round(seconds, 1)}), flush=True)
    held.close()


def rows() -> dict[tuple[str, str], dict[str, Any]]:
    """Cells done so far."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []
    return {(row["model"], row["runtime"]): row for row in map(json.loads, lines)}


def table(done: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Counts per runtime, and every cell that is not ok."""
    lines = ["| runtime | cells | edgegen: ok | refused | wrong | failed | crashed | by hand: ok | cured by edgegen |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for runtime in RUNTIMES:
        cells = [row for (_, name), row in done.items() if name == runtime]
        mine, hand = (Counter(row[how]["status"] for row in cells) for how in ("edgegen", "plain"))
        cured = sum(row["edgegen"]["status"] == "ok" and row["plain"]["status"] in ("failed", "wrong", "crashed")
                    for row in cells)  # fmt: skip
        counts = " | ".join(str(mine[status]) for status in ("ok", "refused", "wrong", "failed", "crashed"))
        said = "not here" if hand["not here"] else str(hand["ok"])
        lines.append(f"| {runtime} | {len(cells)} | {counts} | {said} | {cured} |")
    lines += ["", "| network | runtime | by hand | edgegen | why |", "|---|---|---|---|---|"]
    for (name, runtime), row in sorted(done.items()):
        mine, hand = row["edgegen"], row["plain"]
        if mine["status"] == "ok" and hand["status"] in ("ok", "not here"):
            continue
        told = [f"{p['op']} ({p['layer']}): {p['rewrite']}" for p in mine.get("problems", [])[:2]]
        why = mine.get("why") or "; ".join(told)
        why = why or (f"rewritten: {', '.join(mine['rewrites'])}" if mine.get("rewrites") else "")
        why = why or (f"by hand: {hand.get('why', hand.get('difference', ''))}" if mine["status"] == "ok" else "")
        why = why or f"difference {mine.get('difference')}"
        lines.append(f"| {name} | {runtime} | {hand['status']} | {mine['status']} | {why.replace('|', '/')[:220]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cells that are not done yet, or only print tries (--try), or only write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--runtime", nargs="*", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new network is begun")
    parser.add_argument("--share", default="0/1", help="K/N: every N-th network from the K-th, for several processes")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--try", dest="attempt", nargs="+", help="HOW NETWORK RUNTIME ...: only print")
    parser.add_argument("--batch", nargs="+", help="HOW NETWORK:RUNTIME ...: what a process of the sweep does")
    options = parser.parse_args()
    if options.attempt or options.batch:
        how, *jobs = options.batch or (options.attempt[0], *(f"{options.attempt[1]}:{r}" for r in options.attempt[2:]))
        return tried(how, [(name, runtime) for name, _, runtime in (job.partition(":") for job in jobs)])
    part, parts = map(int, options.share.split("/"))
    names = [name for name in (*BUILTIN, *TIMM) if options.only is None or name in options.only][part::parts]
    begun = time.monotonic()
    for start in range(0, len(names), BATCH):
        done = rows()
        left = [(n, r) for n in names[start : start + BATCH] for r in options.runtime if (n, r) not in done]
        if left and not options.table and time.monotonic() - begun < options.limit:
            batch(left)
    RESULTS.with_suffix(".md").write_text(table(rows()), encoding="utf-8")
    return None


def batch(jobs: list[Job]) -> None:
    """Cells by hand, then edgegen's, each written as soon as it is done."""
    machine = {"machine": platform.machine(), "torch": version("torch"), "timm": version("timm")}
    hand = dict(isolated("plain", jobs))
    for (name, runtime), mine in isolated("edgegen", jobs):
        row = {"model": name, "runtime": runtime, "plain": hand[name, runtime], "edgegen": mine}
        line = json.dumps({**row, "date": time.strftime("%Y-%m-%d"), **machine})
        with RESULTS.open("a", encoding="utf-8") as file:  # converters name files of this machine in their errors
            file.write(line.replace(f"{Path(sys.prefix).parent}/", "").replace(f"{ROOT}/", "") + "\n")
        print(f"{name} {runtime}: {hand[name, runtime]['status']} by hand, {mine['status']}", flush=True)
        RESULTS.with_suffix(".md").write_text(table(rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
