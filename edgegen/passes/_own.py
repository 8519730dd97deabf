"""Networks of the user's own that a pass learns by: a discriminator, an encoder of images."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from edgegen import origins, weights
from edgegen.nn import encoders
from edgegen.passes._game import seeded


def network(what: str, spec: str, file: str, seed: int) -> nn.Module:
    """A fresh network from "file.py:factory", drawn by the seed, with the weights of `file` where there is one.

    Raises:
        ValueError: another form. ModelError: the factory or the weights cannot be used.
    """
    path, _, factory = spec.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"{what} must be file.py:factory, got {spec!r}")
    module = seeded(seed, lambda: origins.create({"kind": "file", "path": path, "factory": factory}))
    if file:
        weights.load_into(module, weights.read_state(Path(file)), file)
    return module


def encoder(spec: str, file: str, seed: int) -> nn.Module:
    """An encoder that ships, or the user's own: images (N, 3, H, W) in 0..1 -> maps (N, C, h, w), or (maps, pooled).

    Raises:
        ValueError: weights without a network. ModelError: no such encoder, or one that cannot be used.
    """
    if ":" in spec or spec.endswith(".py"):
        return network("encoder", spec, file, seed).eval()
    if file:
        raise ValueError(f"encoder_weights are given, and the encoder {spec} has its own; give file.py:factory")
    return encoders.create(spec)
