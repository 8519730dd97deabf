"""Weights load completely and safely, or are refused with one line that says what is wrong."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgegen import weights
from edgegen.errors import ModelError

ASSETS = Path(__file__).parents[1].parent / "shared" / "assets"


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


class _Code:
    """Unpickled, it would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        weights.read_state(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_safetensors_round_trip_is_exact_and_deterministic(tmp_path: Path) -> None:
    net = _net()
    weights.save_state(net, tmp_path / "a.safetensors")
    weights.save_state(net, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    other = _net(1)
    assert weights.state_hash(other) != weights.state_hash(net)
    weights.load_into(other, weights.read_state(tmp_path / "a.safetensors"), "a")
    assert weights.state_hash(other) == weights.state_hash(net)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_state_hash_sees_values_names_shapes_and_dtypes(change: str) -> None:
    def module(tensor: torch.Tensor, name: str = "x") -> nn.Module:
        holder = nn.Module()
        holder.register_buffer(name, tensor)
        return holder

    zeros = torch.zeros(4)
    changed = {
        "value": module(torch.tensor([0.0, 0, 0, 1])),
        "name": module(zeros, "y"),
        "shape": module(zeros.reshape(2, 2)),
        "dtype": module(zeros.to(torch.int32)),
    }[change]
    assert weights.state_hash(module(zeros)) == weights.state_hash(module(zeros.clone()))
    assert weights.state_hash(module(zeros)) != weights.state_hash(changed)


@pytest.mark.parametrize("key", ["state_dict", "model", "params", "params_ema", "ema", "generator"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_wrapped_and_prefixed_checkpoints_are_understood(tmp_path: Path, key: str, prefix: str) -> None:
    net, other = _net(), _net(1)
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    torch.save({key: state, "epoch": 3, "best": 0.5}, tmp_path / "w.pth")
    weights.load_into(other, weights.read_state(tmp_path / "w.pth"), "w.pth")
    assert weights.state_hash(other) == weights.state_hash(net)


def test_averaged_weights_win_over_plain_ones(tmp_path: Path) -> None:
    torch.save({"params": {"w": torch.zeros(2)}, "params_ema": {"w": torch.ones(2)}}, tmp_path / "w.pth")
    assert weights.read_state(tmp_path / "w.pth")["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("direction", ["drop", "add"])
def test_one_common_leading_name_is_dropped_or_added(direction: str) -> None:
    net, holder = _net(), nn.Module()
    holder.net = _net(1)
    if direction == "drop":
        state = {f"generator.{name}": tensor for name, tensor in net.state_dict().items()}
        weights.load_into(holder.net, state, "w")
    else:
        weights.load_into(holder, net.state_dict(), "w")
    assert weights.state_hash(holder.net) == weights.state_hash(net)


def test_half_precision_is_cast_and_requires_grad_is_kept() -> None:
    net, other = _net(), _net(1)
    other[0].weight.requires_grad_(False)
    state = {n: t.half() if t.is_floating_point() else t for n, t in net.state_dict().items()}
    weights.load_into(other, state, "w")
    assert other[0].weight.dtype == torch.float32
    assert torch.equal(other[0].weight, net[0].weight.half().float())
    assert not other[0].weight.requires_grad and other[2].weight.requires_grad


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    net, other = _Tied(), _Tied()
    weights.save_state(net, tmp_path / "t.safetensors")
    state = weights.read_state(tmp_path / "t.safetensors")
    assert sorted(state) == ["a.bias", "a.weight", "b.bias"]
    weights.load_into(other, state, "t")
    assert other.a.weight is other.b.weight
    assert weights.state_hash(other) == weights.state_hash(net)


def test_missing_num_batches_tracked_is_allowed() -> None:
    net, other = _net(), _net(1)
    state = {n: t for n, t in net.state_dict().items() if not n.endswith("num_batches_tracked")}
    weights.load_into(other, state, "w")
    assert torch.equal(other[1].weight, net[1].weight) and torch.equal(other[0].weight, net[0].weight)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"w": _Code(mark)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Code(mark)))
    torch.save(_net(), tmp_path / "module.pth")
    for name in ("zip.pth", "plain.pth", "module.pth"):
        message = _refused(tmp_path / name)
        assert "refused, and not run" in message and name in message
    assert not mark.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())  # noqa: S301  the proof that the trap works
    assert mark.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(_net().state_dict(), path)
    else:
        weights.save_state(_net(), path)
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert path.name in _refused(path)
    assert "empty" in (path.write_bytes(b""), _refused(path))[1]


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"hello world", b"\x80\x02", b"version https://git-lfs"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    assert path.name in _refused(path)


def test_missing_file_unknown_type_and_no_tensors_are_refused(tmp_path: Path) -> None:
    assert "no such file" in _refused(tmp_path / "none.pth")
    (tmp_path / "w.h5").write_bytes(b"x")
    assert "unknown file type '.h5'" in _refused(tmp_path / "w.h5")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    assert "no tensors found; it has epoch" in _refused(tmp_path / "w.pth")
    torch.save([torch.zeros(1)], tmp_path / "w.pth")
    assert "holds a list" in _refused(tmp_path / "w.pth")
    torch.save({"w": torch.zeros(1), "decoder": {"w": torch.zeros(1)}}, tmp_path / "w.pth")
    assert "beside the groups decoder" in _refused(tmp_path / "w.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_and_infinity_are_refused_by_name(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    state = {"good": torch.ones(3), "bad": torch.tensor([1.0, value], dtype=dtype)}
    torch.save(state, tmp_path / "w.pth")
    assert "bad has NaN or infinity in 1 of 2 values" in _refused(tmp_path / "w.pth")


def test_wrong_shape_names_tensor_got_and_expected_and_changes_nothing() -> None:
    net = _net()
    before = weights.state_hash(net)
    state = _net(1).state_dict()
    state["2.weight"] = torch.zeros(3, 4, 1, 1)
    with pytest.raises(ModelError, match=r"2\.weight has shape \(3, 4, 1, 1\), the network expects \(2, 4, 1, 1\)"):
        weights.load_into(net, state, "w")
    assert weights.state_hash(net) == before


def test_integers_for_floats_are_refused() -> None:
    state = {**_net(1).state_dict(), "2.weight": torch.zeros(2, 4, 1, 1, dtype=torch.int8)}
    with pytest.raises(ModelError, match=r"2\.weight is torch\.int8"):
        weights.load_into(_net(), state, "w")


def test_partial_match_lists_missing_and_unexpected_with_the_near_match() -> None:
    net = _net()
    before = weights.state_hash(net)
    state = _net(1).state_dict()
    state["2.weigth"] = state.pop("2.weight")
    with pytest.raises(ModelError) as caught:
        weights.load_into(net, state, "w.pth")
    text = str(caught.value)
    assert "1 missing [2.weight], 1 unexpected [2.weigth] ('2.weigth', did you mean '2.weight'?)" in text
    assert weights.state_hash(net) == before


def test_long_lists_are_abbreviated_with_counts() -> None:
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    with pytest.raises(ModelError) as caught:
        weights.load_into(net, {"0.weight": torch.zeros(2, 2)}, "w")
    assert "of 40 tensors 39 missing" in str(caught.value) and "... 31 more" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_real_files_read(tmp_path: Path) -> None:
    names = {"resnet20-cifar10.th": "conv1.weight", "rlfn-x4.pth": "conv_1.weight", "style-mosaic.safetensors": None}
    if not ASSETS.is_dir():
        pytest.skip("../shared/assets is not here")
    for name, key in names.items():
        state = weights.read_state(ASSETS / name)
        assert key is None or key in state
    shutil.copy(ASSETS / "resnet20-cifar10.th", tmp_path / "half.th")
    whole = (tmp_path / "half.th").read_bytes()
    (tmp_path / "half.th").write_bytes(whole[: len(whole) // 2])
    assert "half.th" in _refused(tmp_path / "half.th")
