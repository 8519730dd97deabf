"""Networks with blocks of edgegen in them, and with shared modules, come back from JSON and weights alone."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgegen import architecture, weights
from edgegen.errors import ModelError

HOME = "edgegen.nn.fake_blocks"


class Pair(nn.Module):
    """Two convolutions in the place of one."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.config = {"wide": wide, "narrow": narrow}
        self.down, self.up = nn.Conv2d(wide, narrow, 1), nn.Conv2d(narrow, wide, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class Scaled(nn.Module):
    """Keeps what it replaces."""

    WRAPS = True

    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.config = {"by": by}
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.config["by"]


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake file of edgegen.nn with the two classes."""
    home: Any = types.ModuleType(HOME)
    for cls in (Pair, Scaled):
        monkeypatch.setattr(cls, "__module__", HOME)
        setattr(home, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, HOME, home)


def _chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)).eval()


def _changed() -> tuple[nn.Module, nn.Module]:
    original = _chain()
    net: Any = copy.deepcopy(original)
    net[1] = Pair(8, 2).eval()
    net[2] = Scaled(net[2], 0.5).eval()
    net[3] = net[1]
    return net, original


def test_blocks_and_shared_modules_come_back(tmp_path: Path) -> None:
    net, original = _changed()
    net[1].down = nn.Conv2d(8, 2, 1, bias=False)  # changed after it was put in: told as a difference from a fresh one
    text = json.dumps(architecture.describe(net, original), allow_nan=False)
    weights.save_state(net, tmp_path / "w.safetensors")
    again: Any = architecture.rebuild(_chain(), json.loads(text)).eval()
    weights.load_into(again, weights.read_state(tmp_path / "w.safetensors"), "w")
    assert again[3] is again[1] and again[1].down.bias is None
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(x), net(x))
    assert str(again) == str(net)


def test_the_original_is_not_touched() -> None:
    net, original = _changed()
    before = str(original)
    architecture.describe(net, original)
    assert str(original) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "os.path.Pair"}, "no block of edgegen"),
        ({"block": f"{HOME}.Missing"}, "does not have"),
        ({"block": "edgegen.nn.nowhere.Pair"}, "does not have"),
        ({"config": {"wide": 8}}, "wrong configuration"),
        ({"was": "Linear"}, "is a Conv2d, not a Linear"),
        ({"path": "9"}, "does not fit"),
    ],
)
def test_what_is_not_ours_is_refused(change: dict[str, Any], message: str) -> None:
    net, original = _changed()
    description = architecture.describe(net, original)
    description["blocks"][0] |= change
    with pytest.raises(ModelError, match=message):
        architecture.rebuild(_chain(), description)
