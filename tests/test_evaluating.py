"""Finished bundles are evaluated: alone and in pairs, in blocks that are kept and shared among processes."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import edgegen
from edgegen import bundle, cli_evaluate, data, evaluating, evaluation_figures, evaluation_work, files
from edgegen.bundle import Contents
from edgegen.errors import BundleError, DataError, UsageError
from edgegen.evaluating import Settings, evaluate
from edgegen.metrics import _blocks
from edgegen.types import Artifact, Graph, Model, PrecisionPlan, Stage, TensorSpec

SIZES = {"classification": ((1, 3, 8, 8), (1, 4)), "restoration": ((1, 3, 16, 16), (1, 3, 16, 16)),
         "unconditional": ((1, 12), (1, 3, 32, 32))}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def made(folder: Path, task: str, strength: float = 1.0) -> Path:
    """A bundle whose network is one matrix product, or x * strength for restoration."""
    given, out = SIZES[task]
    rng = np.random.default_rng(0)
    nodes, constants = [], []
    if task == "restoration":
        constants = [helper.make_tensor("w", TensorProto.FLOAT, [], [strength])]
        nodes = [helper.make_node("Mul", ["input", "w"], ["output"])]
    else:
        inputs, outputs = int(np.prod(given)), int(np.prod(out))
        weight = (rng.normal(size=(inputs, outputs)) * strength).astype(np.float32)
        constants = [helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.ravel()),
                     helper.make_tensor("shape", TensorProto.INT64, [len(out)], out)]  # fmt: skip
        nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"]),
                 helper.make_node("Reshape", ["y", "shape"], ["output"])]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("input", given), ("output", out))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    file = folder / "built" / "model.onnx"
    file.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    span = None if task == "classification" else (-1.0, 1.0) if task == "unconditional" else (0.0, 1.0)
    specs = (TensorSpec("input", given, value_range=(0.0, 1.0)),), (TensorSpec("output", out, value_range=span),)
    model = Model("net", task, (Stage("main", None, *specs),), origin={"kind": "onnx", "path": "net.onnx"})
    model = dataclasses.replace(model, options={"features": "cifar"})
    artifact = Artifact("onnxruntime", file, (file,), PrecisionPlan(), file.stat().st_size, *specs, {"threads": 1})
    told = Graph("main", file, *specs, sha256=files.sha256(file))
    report = {"report.html": "<p>", "report.json": "{}"}
    contents = Contents(model, model, (artifact,), told, "cpu", "seed = 0\n", report=report)
    return bundle.write(folder / "bundle", contents).path


def photos(folder: Path, n: int, task: str) -> Path:
    rng = np.random.default_rng(1)
    side = SIZES[task][0][2] if task != "unconditional" else 32
    x = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    y = x if task == "restoration" else rng.integers(0, 4, n)
    np.savez(folder / "data.npz", x=x, **({} if task == "unconditional" else {"y": y}))
    return folder / "data.npz"


def quiet(step, text, share):
    pass


def named(figures):
    return {m.name: m for m in figures}


def test_restoration_alone_and_in_pairs(tmp_path):
    same, darker = made(tmp_path / "a", "restoration"), made(tmp_path / "b", "restoration", 0.9)
    settings = Settings(photos(tmp_path, 70, "restoration"))
    alone = named(evaluate([same], settings, quiet).figures[0])
    assert alone["psnr to the reference"].value == pytest.approx(100, abs=1)
    assert alone["bad_images"].value == 0 and alone["psnr to the reference"].conditions["n"] == 70
    both = evaluate([same, darker], settings, quiet)
    second, paired = named(both.figures[1]), named(both.paired)
    assert -14 < second["brightness_shift to the reference"].value < -11
    assert paired["psnr of the second to the first"].value < 30
    change = paired["brightness_shift to the reference: second less first"]
    assert change.interval[0] <= change.value <= change.interval[1] < -10
    values = paired["psnr of the second to the first"].samples
    assert [v for _, v, _ in both.worst] == pytest.approx(sorted(values)[:4]) and both.worst_of == "psnr"
    assert {"data", "file_format", "fit", "artifact", "seed", "networks"} <= set(change.conditions)
    assert both.figures[1][0].conditions["artifact"] == ["onnxruntime fp32"]


def test_a_classifier_is_right_wrong_and_corrupted(tmp_path):
    path, file = made(tmp_path / "a", "classification"), photos(tmp_path, 90, "classification")
    metrics = ("top1", "corruption_accuracy")
    found = named(evaluate([path], Settings(file, metrics), quiet).figures[0])
    assert 0.1 < found["top1"].value < 0.5  # four classes by chance
    weight = np.random.default_rng(0).normal(size=(192, 4))
    with np.load(file) as stored:
        right = stored["x"].transpose(0, 3, 1, 2).reshape(90, -1) / 255 @ weight
        np.savez(tmp_path / "own.npz", x=stored["x"], y=right.argmax(axis=1))
    own = named(evaluate([path], Settings(tmp_path / "own.npz", metrics), quiet).figures[0])
    assert own["top1"].value == 1.0 and 0.3 < own["corruption_accuracy"].value < 1.0
    assert set(own["corruption_accuracy"].conditions["each"]) == {"noise", "blur", "jpeg", "contrast"}
    pair = evaluate([path, made(tmp_path / "b", "classification", -1.0)], Settings(tmp_path / "own.npz"), quiet)
    paired = named(pair.paired)
    assert paired["agreement"].value < 0.2 and paired["top1: second less first"].value < -0.8


def test_a_generator_against_real_images_and_against_another(tmp_path):
    path, other = made(tmp_path / "a", "unconditional"), made(tmp_path / "b", "unconditional", 0.3)
    file = photos(tmp_path, 80, "unconditional")
    settings = Settings(file, ("kid", "fid", "precision", "spectrum", "bad_images"), n=100)
    found = evaluate([path, other], settings, quiet)
    first = named(found.figures[0])
    assert first["kid"].conditions["n"] == (80, 100) and "KID decides" in first["fid"].conditions["warning"]
    assert first["kid"].conditions["extractor"] == "cifar encoder" and len(found.worst) == 4
    paired = named(found.paired)
    for name in ("kid", "fid", "precision", "spectrum"):
        change = paired[f"{name}: second less first"]
        assert change.value == pytest.approx(named(found.figures[1])[name].value - first[name].value, abs=1e-6)
        assert change.interval[0] <= change.value <= change.interval[1]
    same = named(evaluate([path, path], settings, quiet).paired)
    assert same["kid: second less first"].value == 0 and same["spectrum: second less first"].interval == (0.0, 0.0)


def test_a_network_without_pairs_is_compared_with_real_images_as_sets(tmp_path):
    """As a CycleGAN: inputs of one kind, images of another, no references."""
    path, same = made(tmp_path / "a", "restoration", 0.3), made(tmp_path / "b", "restoration")
    told = [bundle.read(one).path / "manifest.json" for one in (path, same)]
    for file in told:
        file.write_text(file.read_text().replace('"task": "restoration"', '"task": "image-to-image"'))
    rng = np.random.default_rng(2)
    np.savez(tmp_path / "inputs.npz", x=rng.integers(0, 256, (70, 16, 16, 3), dtype=np.uint8))
    np.savez(tmp_path / "real.npz", x=rng.integers(0, 256, (90, 20, 20, 3), dtype=np.uint8))
    settings = Settings(tmp_path / "inputs.npz", real=tmp_path / "real.npz")
    dark, right = (named(figures) for figures in evaluate([path, same], settings, quiet).figures)
    assert {"kid", "fid", "precision", "recall", "spectrum", "bad_images"} == dark.keys()
    assert dark["kid"].value > right["kid"].value + 0.01 and right["kid"].conditions["n"] == (70, 70)
    told = right["kid"].conditions
    assert told["real"].endswith("real.npz") and "16 x 16" in told["reference_fit"]
    with pytest.raises(UsageError, match="needs real images; give --real"):
        evaluate([path], Settings(tmp_path / "inputs.npz", ("fid",)), quiet)
    np.savez(tmp_path / "floats.npz", x=rng.random((5, 3, 16, 16), dtype=np.float32))
    for real, task, error, words in [
        ("floats.npz", "restoration", DataError, "holds arrays; what is generated is compared with images"),
        ("real.npz", "classification", UsageError, "no images"),
        ("real.npz", "unconditional", UsageError, "give one of them"),
    ]:
        other = made(tmp_path / f"{real}{task}", task)
        with pytest.raises(error, match=words):
            evaluate([other], Settings(photos(tmp_path, 9, task), real=tmp_path / real), quiet)


def test_a_second_run_and_one_that_was_cut_off_do_not_run_the_network_again(tmp_path, monkeypatch):
    path = made(tmp_path / "a", "restoration")
    settings = Settings(photos(tmp_path, 150, "restoration"), ("psnr",))
    done, whole = [], evaluation_work.Work.run

    def failing(self, number, inputs):
        done.append(len(inputs))
        if len(done) == 3:
            raise KeyboardInterrupt
        return whole(self, number, inputs)

    monkeypatch.setattr(evaluation_work.Work, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate([path], settings, quiet)
    first = evaluate([path], settings, quiet)
    assert done[:4] == [64, 64, 22, 22]  # two blocks were kept, the third is done again
    before = len(done)
    again = evaluate([path], settings, quiet)
    assert again.figures == first.figures and len(done) == before + 1  # only the worst images
    damaged = next((tmp_path / "cache" / "features").rglob("000001.npz"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert evaluate([path], settings, quiet).figures == first.figures


WORKER = """
import json, sys
from pathlib import Path
from edgegen.evaluating import Settings, evaluate
found = evaluate([Path(sys.argv[1])], Settings(Path(sys.argv[2]), ("kid", "fid", "recall"), n=150), lambda *a: None)
print(json.dumps([[m.name, m.value, m.interval] for m in found.figures[0]]))
"""


def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    """As torchrun starts them, with a cache folder each: two machines without a common disk."""
    path, file = made(tmp_path / "a", "unconditional"), photos(tmp_path, 140, "unconditional")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = []
    for rank in range(2):
        more = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "EDGEGEN_CACHE": str(tmp_path / f"cache{rank}"), "OMP_NUM_THREADS": "1"}  # fmt: skip
        running.append(subprocess.Popen([sys.executable, "-c", WORKER, str(path), str(file)], text=True,
                                        env={**os.environ, **more}, stdout=subprocess.PIPE))  # fmt: skip
    told = [json.loads(process.communicate(timeout=200)[0].splitlines()[-1]) for process in running]
    alone = evaluate([path], Settings(file, ("kid", "fid", "recall"), n=150), quiet).figures[0]
    expected = [[m.name, m.value, list(m.interval)] for m in alone]
    assert told[0] == told[1] == expected


def test_processes_that_do_not_come_are_said_in_one_line(tmp_path, monkeypatch):
    from torch import distributed

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(found.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(_blocks, "WAIT_HOURS", 0.5 / 3600)
    alone = _blocks.Blocks(tmp_path / "blocks", 2)
    with pytest.raises(DataError, match=r"process 0 of 2 waited .* start them all again") as caught:
        alone.fill(lambda number: {"x": np.zeros(1)}, _blocks.Share(0, 2, together=True), lambda text, part: None)
    assert "\n" not in str(caught.value) and not distributed.is_initialized()
    assert alone.read(0) is not None  # what is finished is kept
    given = []
    monkeypatch.setattr(distributed, "init_process_group", lambda *a, timeout, **k: given.append(timeout))
    monkeypatch.setattr(_blocks.Blocks, "_hand_out", lambda self, share: None)
    monkeypatch.setattr(_blocks, "WAIT_HOURS", 48.0)
    alone.fill(lambda number: {"x": np.zeros(1)}, _blocks.Share(0, 2, together=True), lambda text, part: None)
    assert given[0].total_seconds() == 48 * 3600


def test_shards_by_hand_and_what_is_missing_is_said(tmp_path):
    path, file = made(tmp_path / "a", "restoration"), photos(tmp_path, 130, "restoration")
    settings = Settings(file, ("psnr",))
    for number in (1, 0):
        assert not evaluate([path], dataclasses.replace(settings, shard=f"{number}/2"), quiet).complete
    blocks = sorted(p.name for p in (tmp_path / "cache" / "features").rglob("*.npz"))
    assert blocks == ["000000.npz", "000001.npz", "000002.npz"]
    assert evaluate([path], settings, quiet).complete
    part = _blocks.Blocks(tmp_path / "none", 3)
    with pytest.raises(DataError, match="3 of 3 blocks are not there yet"):
        list(part.all())
    for text in ("2/2", "a/b", "1"):
        with pytest.raises(DataError, match="must be I/N"):
            _blocks.share_of(text)


@pytest.mark.parametrize(
    ("task", "metrics", "words"),
    [
        ("restoration", ("fidd",), "did you mean 'fid'"),
        ("restoration", ("top1",), "is not for restoration"),
        ("restoration", ("kid",), "needs real images"),
        ("classification", ("agreement",), "compares two bundles"),
        ("unconditional", ("psnr",), "needs reference images"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(tmp_path, task, metrics, words):
    path = made(tmp_path / "a", task)
    with pytest.raises(UsageError, match=words) as caught:
        evaluate([path], Settings(photos(tmp_path, 10, task), metrics, n=10), quiet)
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_line(tmp_path):
    path = made(tmp_path / "a", "restoration")
    other = made(tmp_path / "b", "classification")
    for paths, settings, error, words in [
        ([path], Settings(), DataError, "give --data"),
        ([path, other], Settings(), BundleError, "only networks of the same task"),
        ([tmp_path], Settings(), BundleError, "is not a bundle"),
        ([path] * 3, Settings(), UsageError, "one bundle, or two"),
    ]:
        with pytest.raises(error, match=words):
            evaluate(paths, settings, quiet)
    (path / "model.onnxruntime.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="not the file that was bundled"):
        evaluate([path], Settings(photos(tmp_path, 10, "restoration")), quiet)


def test_what_overflows_is_counted_as_not_finite_and_comes_first_among_the_worst(tmp_path):
    path, darker = made(tmp_path / "a", "restoration", float("inf")), made(tmp_path / "b", "restoration", 1e-3)
    file = photos(tmp_path, 70, "restoration")
    first, second = map(named, evaluate([path, darker], Settings(file, ("psnr", "bad_images")), quiet).figures)
    assert first["bad_images"].value == 1 and np.isnan(first["psnr to the reference"].value)
    assert first["bad_images"].conditions["kinds"] == {"not finite": 70, "black": 0, "flat": 0}
    assert second["bad_images"].conditions["kinds"] == {"not finite": 0, "black": 70, "flat": 0}
    assert evaluation_figures._first(np.array([3.0, np.nan, 1]), np.array([3.0, np.nan, 1]))[0][0] == 1


MAPLESS = "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten())\n"


def test_an_extractor_without_maps_has_no_perceptual_distance_and_that_is_said(tmp_path):
    (tmp_path / "mapless.py").write_text(MAPLESS)
    path, file = made(tmp_path / "a", "restoration"), photos(tmp_path, 10, "restoration")
    features = f"{tmp_path / 'mapless.py'}:net"
    found = evaluate([path], Settings(file, features=features), quiet)
    assert "ssim to the reference" in named(found.figures[0])
    assert found.left_out.keys() == {"perceptual"} and "mapless.py:net" in found.left_out["perceptual"]
    assert not any("perceptual" in name for name in named(found.figures[0]))
    with pytest.raises(DataError, match="give --features cifar"):
        evaluate([path], Settings(file, ("psnr", "perceptual"), features=features), quiet)
    assert not evaluate([path], Settings(file), quiet).left_out


def test_the_command(tmp_path, capsys, monkeypatch):
    from edgegen import cli

    path, file = made(tmp_path / "a", "restoration"), photos(tmp_path, 20, "restoration")
    out = tmp_path / "told"
    arguments = ["edgegen", "evaluate", str(path), "--data", str(file), "--metric", "psnr", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and told["bundles"][0]["figures"][0]["value"] == pytest.approx(100, abs=1)
    same = edgegen.evaluate(edgegen.load(path), data=str(file), metrics=["psnr"], progress=False)
    assert json.loads(json.dumps(cli_evaluate.as_json([path], same))) == told
    assert json.loads((out / "evaluation.json").read_text()) == told and (out / "worst.png").stat().st_size > 100
    with np.load(out / "worst.npz", allow_pickle=False) as kept:
        assert kept["image 0"].shape == (4, 3, 16, 16) and list(kept["columns"]) == ["reference", "1: bundle"]
    monkeypatch.setattr(sys, "argv", ["edgegen", "evaluate", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


MEMORY = """
import resource, sys
import numpy as np
from edgegen.metrics import cmmd, fid, kid
from edgegen.nn.features import FeatureExtractor
rows = np.random.default_rng(0).normal(size=(3072, 256)).astype(np.float32) / 40
features = FeatureExtractor("made up", "0" * 64, lambda x: ([], x.reshape(len(x), -1) @ rows))
def images(n, seed):
    for start in range(0, n, 50):
        yield np.random.default_rng([seed, start]).random((50, 3, 32, 32), dtype=np.float32)
for n in (1000, 5000):
    kid.kid(images(n, 0), images(n, 1), features=features, subsets=5)
    fid.fid(images(n, 0), images(n, 1), features=features)
    cmmd.cmmd(images(n, 0), images(n, 1), features=features)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_peak_memory_is_flat_from_1000_to_5000_images():
    """The images would take 61 MB a side, and their features in float64 10 MB more a side."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, env=env)
    small, large = map(float, done.stdout.split())
    assert large - small < 25


WHOLE_MEMORY = """
import resource, sys
from pathlib import Path
from edgegen.evaluating import Settings, evaluate
metrics = ("kid", "spectrum", "bad_images")  # FID's bootstrap holds up to 16 million features at once
for n in (4000, 10000):
    settings = Settings(Path(sys.argv[2]), metrics, n=n, features=sys.argv[3])
    evaluate([Path(sys.argv[1])], settings, lambda *a: None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_peak_memory_of_a_whole_evaluation_is_flat_from_4000_to_10000_images(tmp_path):
    """The images alone would take 74 MB more. (Below 2,000 the bootstrap of a mean draws fewer numbers at once.)"""
    path, file = made(tmp_path / "a", "unconditional"), photos(tmp_path, 100, "unconditional")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "pooled.py").write_text(MAPLESS)  # its features take no time
    command = [sys.executable, "-c", WHOLE_MEMORY, str(path), str(file), f"{tmp_path / 'pooled.py'}:net"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    small, large = map(float, done.stdout.split())
    assert large - small < 25


def test_samples_of_a_dataset_know_their_place(tmp_path):
    path = made(tmp_path / "a", "classification")
    source = data.open_source(photos(tmp_path, 30, "classification"))
    dataset = data.Dataset(source, evaluation_work.subject(path).model, length=5)
    assert [source.key(dataset.place(i)) for i in range(5)] == [dataset.key(i) for i in range(5)]
    assert evaluating.DEFAULT_N == 2048
