"""Checkpoints with numbers that are drawn, saved and loaded as published ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from edgegen import loading  # noqa: E402
from edgegen.records import ModelOptions  # noqa: E402

STYLE, SIZE, WIDTH = 12, 16, 6


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def load(name: str, file: Path, **options: Any) -> nn.Module:
    return loading.load_model(name, weights=file, options=ModelOptions(**options)).stage.module


def saved(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def rosinality() -> dict[str, Tensor]:
    """g_ema of rosinality/stylegan2-pytorch for 16 pixels, one width, two mapping layers."""
    shapes: dict[str, tuple[int, ...]] = {"input.input": (1, WIDTH, 4, 4)}
    for i in (1, 2):
        shapes |= {f"style.{i}.weight": (STYLE, STYLE), f"style.{i}.bias": (STYLE,)}
    heads = [(place, 3, 1) for place in ("to_rgb1", "to_rgbs.0", "to_rgbs.1")]
    for place, outputs, kernel in [("conv1", WIDTH, 3), *((f"convs.{i}", WIDTH, 3) for i in range(4)), *heads]:
        shapes |= {f"{place}.conv.weight": (1, outputs, WIDTH, kernel, kernel),
                   f"{place}.conv.modulation.weight": (WIDTH, STYLE), f"{place}.conv.modulation.bias": (WIDTH,)}
        if kernel == 3:
            shapes |= {f"{place}.noise.weight": (1,), f"{place}.activate.bias": (WIDTH,)}
        else:
            shapes |= {f"{place}.bias": (1, 3, 1, 1)}
        if place in ("convs.0", "convs.2"):
            shapes[f"{place}.conv.blur.kernel"] = (4, 4)
    shapes |= {f"to_rgbs.{i}.upsample.kernel": (4, 4) for i in (0, 1)}
    shapes |= {f"noises.noise_{i}": (1, 1, r, r) for i, r in enumerate((4, 8, 8, 16, 16))}
    state = drawn(shapes)
    for i in (1, 2):
        state[f"style.{i}.weight"] *= 100  # stored divided by the learning rate multiplier
    return state


TINY = {"size": SIZE, "width": WIDTH, "latent": STYLE, "style": STYLE, "layers": 2}
