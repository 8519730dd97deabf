"""Two real processes under torchrun end with the weights of one, and only the first of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from torch import nn

from edgegen import registry
from edgegen.training import distributed
from edgegen.types import Job, Target

SCRIPT = '''
import json, sys
from pathlib import Path
import torch
from edgegen import training, weights
from edgegen.passes.distill import distill
from edgegen.training import distributed
from edgegen.types import Job, Target
sys.path.insert(0, sys.argv[1])
import conftest
from test_training_distributed import loss, net, batch_at

out = Path(sys.argv[2])
torch.set_num_threads(1)
with distributed.joined():
    own = distributed.group()
    result = training.train(net(), loss, batch_at, steps=6, lr=1e-2, precision="fp32", threads=1, accumulate=2,
                            checkpoint=out / f"state-{own.count}.safetensors", every_s=0,
                            evaluate=lambda module: float(own.rank == 0), every=3)
    model = conftest.make_tiny("residual")
    job = Job(Target("t", "", ()), teacher=conftest.make_tiny("residual"), threads=1)
    taught = distill(model, job, steps=4, batch=4, precision="fp32", features=0.5, losses=["output", "l2"],
                     batchnorm="frozen")
    (out / f"{own.count}-{own.rank}.json").write_text(json.dumps({
        "train": weights.state_hash(result.module), "distill": weights.state_hash(taught.model.stage.module),
        "curve": result.curve, "scores": result.scores}))
    if distributed.first():
        torch.save({"train": result.module.state_dict(), "distill": taught.model.stage.module.state_dict()},
                   out / f"{own.count}.pt")
    distributed.wait()
'''


def net() -> nn.Module:
    torch.manual_seed(0)
    # no bias: before a batch norm its gradient is rounding noise, of which AdamW makes steps
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))


def batch_at(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    scale = torch.linspace(0.2, 2, 4).view(4, 1, 1, 1)  # the processes' shares have different statistics
    return {"x": (torch.rand((4, 3, 8, 8), generator=generator) * scale,), "note": "kept"}


def loss(module: nn.Module, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    (x,) = batch["x"]
    return {"image": (module(x) - x.flip(1)).float().square().mean()}


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here = str(Path(__file__).parent)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(here).parent)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start in ([], launch):
        command = [sys.executable, *start, str(script), here, str(tmp_path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second, "both processes end with the same weights, and the first one's evaluation holds"
    assert [value for _, value in one["curve"]] == pytest.approx([value for _, value in first["curve"]], abs=1e-5)
    alone, together = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    for kind in ("train", "distill"):
        for name, value in alone[kind].items():
            torch.testing.assert_close(together[kind][name], value, rtol=0, atol=2e-4, msg=f"{kind} {name}")
    assert first["scores"] == [[3, 1.0], [6, 1.0]]
    assert (tmp_path / "state-2.safetensors").is_file()


def test_alone_nothing_is_shared_and_nothing_waits() -> None:
    own = distributed.group()
    batch = batch_at(0)
    assert (own.rank, own.count) == (0, 1)
    assert distributed.share(batch, own) is batch
    assert distributed.mean([1.0, 2.0]) == [1.0, 2.0]
    assert distributed.from_first(lambda: 3.0) == 3.0
    distributed.check_agree("anything", 7)
    distributed.wait()
    with distributed.joined() as same, distributed.synced(net()):
        assert same == own


def test_shares_are_parts_of_every_tensor() -> None:
    batch = {"x": (torch.arange(6),), "scale": torch.tensor(2.0), "note": "kept", "none": None}
    parts = [distributed.share(batch, distributed.Group(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([part["x"][0] for part in parts]), batch["x"][0])
    assert all(part["note"] == "kept" and part["none"] is None and part["scale"] == 2 for part in parts)
    with pytest.raises(ValueError, match="a batch of 6 cannot be shared evenly by 4 processes"):
        distributed.share(batch, distributed.Group(0, 4))


def test_own_device_follows_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.own_device("cuda") == "cuda:3"
    assert distributed.own_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["distill", pytest.param("quantize_aware", marks=pytest.mark.slow), "train_supernet"])
def test_a_pass_computes_on_the_device_of_its_process_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "own_device", lambda device: "cpu")
    model = conftest.make_tiny("residual")
    target = Target("t", "", ("onnxruntime",), precisions=("fp32", "int8"))
    job = Job(target, teacher=model, device="cuda:99", threads=1)  # anything put there would be an error
    options = {"steps": 1, "batch": 2, "precision": "fp32"} | ({} if name == "distill" else {"samples": 2})
    found = getattr(registry.module("passes", name), name)(model, job, **options)
    assert found.notes["curve"]


def test_normalising_by_hand_is_batch_norm() -> None:
    """With one process in the sums, the formula must be torch's own, its gradient and its statistics too."""
    a, b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    with torch.no_grad():
        for norm in (a, b):
            norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_sum", lambda value: value)
        found = distributed._normalised(b, inputs[1])
    wanted = a(inputs[0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for out in (found, wanted):
        (out**3).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(b.running_var, a.running_var, rtol=0, atol=1e-5)
    torch.testing.assert_close(b.running_mean, a.running_mean, rtol=0, atol=1e-6)
    assert b.num_batches_tracked == 1
