"""--train-device: where networks learn is what was asked for, and what is not here is refused before any work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import conftest
import pytest

torch = pytest.importorskip("torch")

from edgegen import cli, registry, run, run_jobs, summary, trainers, training  # noqa: E402
from edgegen.errors import UsageError  # noqa: E402
from edgegen.request import Request  # noqa: E402
from edgegen.types import Job, Target  # noqa: E402

TRAINING = ("distill", "quantize_aware", "train_supernet", "replace_attention", "distill_gan")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call with a number: so many CUDA devices are said to be here."""

    def make(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return make


@pytest.mark.parametrize(
    ("count", "asked", "found"),
    [(0, "auto", "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda"), (2, "cpu", "cpu"), (2, "cuda:1", "cuda:1")],
)
def test_auto_is_cuda_where_there_is_one(count: int, asked: str, found: str, gpus: Any):
    gpus(count)
    assert training.chosen_device(asked) == found


@pytest.mark.parametrize(
    ("count", "asked", "message"),
    [
        (0, "cuda", "--train-device cuda: torch sees no CUDA devices here; take cpu or auto"),
        (2, "cuda:2", "--train-device cuda:2: torch sees 2 CUDA devices here; take cpu or auto"),
        (2, "mps", "--train-device must be auto, cpu, cuda or cuda:N, got 'mps'"),
        (2, "cuda:", "--train-device must be auto, cpu, cuda or cuda:N, got 'cuda:'"),
    ],
)
def test_a_device_that_is_not_here_is_one_line(count: int, asked: str, message: str, gpus: Any):
    gpus(count)
    with pytest.raises(UsageError) as caught:
        training.chosen_device(asked)
    assert str(caught.value) == message


def test_passes_are_told_where_to_train_and_the_report_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: Any
):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    folders = {}
    for count, asked, found in ((0, "auto", "cpu"), (2, "cpu", "cpu"), (2, "cuda:1", "cuda:1")):
        gpus(count)
        request = Request(model="cifar_resnet", out=tmp_path / "out", latency_only=True, train_device=asked)
        opened = run.open_run(request, run.quiet)
        assert run_jobs.job_of(opened).device == found
        assert summary.machine(opened)["trained on"] == found
        folders.setdefault(found, set()).add(opened.folder)
    assert [len(some) for some in folders.values()] == [1, 1], "a run on the CPU is the same run, whoever asked for it"
    assert folders["cpu"] != folders["cuda:1"]


@pytest.mark.parametrize(
    "command",
    [
        ("compress", "--model", "edsr"),
        ("search", "--model", "cifar_resnet"),
        ("train", "--model", "sinddm", "--data", "x.npz", "--out", "x.safetensors"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_trains_refuses_a_gpu_that_is_not_here(
    command: tuple[str, ...], gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    gpus(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["edgegen", *command, "--train-device", "cuda", "--quiet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert ended.value.code == 2
    assert lines == ["edgegen: --train-device cuda: torch sees no CUDA devices here; take cpu or auto"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", TRAINING)
def test_a_pass_learns_on_a_gpu_and_gives_its_network_back_to_the_cpu(name: str):
    model = conftest.make_tiny("residual")
    target = Target("t", "", ("onnxruntime",), precisions=("fp32", "int8"))
    few = {"samples": 2} if name in ("quantize_aware", "train_supernet") else {}
    result = getattr(registry.module("passes", name), name)(
        model, Job(target, teacher=model, device="cuda", threads=1), steps=2, batch=2, **few
    )
    assert {parameter.device.type for parameter in result.model.stage.module.parameters()} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_network_is_trained_on_a_gpu(tmp_path: Path):
    import numpy as np

    np.savez(tmp_path / "x.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.arange(4) % 2)
    order = trainers.Order("cifar_resnet", tmp_path / "x.npz", tmp_path / "w.safetensors", steps=2, batch=2)
    assert trainers.train(order)["device"] == "cuda"
