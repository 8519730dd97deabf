"""What every rewrite of bicubic resizing needs: which nodes are plain bicubic resizing of images, and the kernel."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _net, _program

CORNERS = b"align_corners"


@dataclass(frozen=True)
class Resize:
    """Shapes (N, C, H, W) before and after; whether corners are aligned; the kernel's coefficient, torch's is -0.75."""

    shape: tuple[int, ...]
    out: tuple[int, ...]
    corners: bool = False
    a: float = -0.75

    @property
    def words(self) -> str:
        """For the record of a rewrite."""
        return f"bicubic {self.shape[2]}x{self.shape[3]} to {self.out[2]}x{self.out[3]}"


def of_node(net: _net.Net, node: onnx.NodeProto, modes: Collection[bytes]) -> Resize | None:
    """A Resize node that is cubic in one of these coordinate modes, of images, without antialiasing; else None.

    Scales that are not the ratio of the sizes are another filter, except where corners are aligned.
    """
    shape, out, found = net.shape(node.input[0]), net.shape(node.output[0]), _net.attributes(node)
    mode = found.get("coordinate_transformation_mode", b"half_pixel")
    plain = found.get("mode", b"nearest") == b"cubic" and mode in modes
    other = found.get("antialias", 0) or found.get("exclude_outside", 0) or "axes" in found
    images = len(shape) == 4 == len(out) and shape[:2] == out[:2] and net.is_float(node.input[0])
    if not plain or other or not images:
        return None
    scales = net.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if scales is not None and mode != CORNERS and not np.allclose(scales * shape, out, rtol=0, atol=1e-3):
        return None
    return Resize(shape, out, mode == CORNERS, found.get("cubic_coeff_a", -0.75))


def in_program(network: Any, rewrite: Callable[[Any, Resize], str]) -> dict[str, str]:
    """Try `rewrite(node, resize)` on every aten.upsample_bicubic2d of a torch program, as `_net.each` does."""
    changed = {}
    for node in list(network.graph.nodes):
        resize = _of_call(node) if _program.is_call(node, "aten.upsample_bicubic2d") else None
        if resize is not None and (text := rewrite(node, resize)):
            changed[str(node.name)] = text
    return _program.finish(network, changed)


def _of_call(node: Any) -> Resize | None:
    shape, out = _program.shape(node.args[0]), _program.shape(node)
    factors = _program.argument(node, 3, "scale_factors", None)
    factors = list(factors) if isinstance(factors, (list, tuple)) else [*node.args[3:5]]
    corners = bool(node.args[2])
    exact = corners or all(f is None or abs(f * n - m) < 1e-3 for f, n, m in zip(factors, shape[2:], out[2:]))
    return Resize(shape, out, corners) if len(shape) == 4 and exact else None


def cubic(place: float, a: float) -> np.ndarray:
    """Weights of the pixels at -1, 0, 1, 2 for a point at `place` (0..1)."""
    near = [abs(place), abs(1 - place)]
    far = [1 + place, 2 - place]
    inner = [((a + 2) * d - (a + 3)) * d * d + 1 for d in near]
    outer = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in far]
    return np.array([outer[0], inner[0], inner[1], outer[1]])
