"""Why a build is no faster than it should be, with the figures that say so: pure functions over kernels and facts.

Five causes: memory-bound (time follows the bytes that are moved, not the MACs), launch-bound (so many kernels that
starting them is the time), unaligned width (channels that fill no whole block of the target), float island (layers of
an INT8 build that stayed in float), slower kernel (what is left runs at fewer MACs a second by its type). Several may
hold; none is named without its evidence. Williams, Waterman and Patterson, 2009, Roofline, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgegen import estimate, operators
from edgegen.operators import Kernel
from edgegen.types import Graph, Inspection, Target

LAUNCH_MS = 1e3 * estimate.LAUNCH_S[1]
"""A kernel that takes less is mostly its own start."""
SHARE = 0.2
"""Share of the MACs (0..1) that is worth naming."""
SLOW = ("depthwise", "grouped", "transposed", "matmul")
"""Kinds with fewer MACs a second than plain convolutions and linear layers, on all targets that were timed."""
NARROW = 4
"""Channels of images: as narrow as they are, nobody can widen them."""
_OUTSIDE = ("run", "input", "output")


@dataclass(frozen=True)
class Build:
    """A timed build. ms: its latency, NaN where there is none. inspection: what was read back, None where nothing."""

    kernels: tuple[Kernel, ...]
    ms: float
    precision: str = "fp32"
    inspection: Inspection | None = None

    @property
    def macs(self) -> int:
        """Of all kernels."""
        return sum(kernel.macs for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Activations and weights that all kernels move."""
        return sum(kernel.bytes_moved + kernel.bytes_weights for kernel in self.kernels)


def read(graph: Graph, runtime: str, ms: float, inspection: Inspection | None = None) -> Build | None:
    """A build as its kernels; None where the file is gone or its shapes are not static: then nothing can be said."""
    if not Path(graph.onnx).is_file():
        return None
    try:
        work = operators.kernels(Path(graph.onnx), runtime, graph.plan)
    except ValueError:
        return None
    return Build(tuple(work), ms, graph.plan.precision, inspection)


def why(build: Build, before: Build, target: Target) -> list[str]:
    """Every cause that has evidence, the most telling first.

    Args:
        build: what did not pay. before: what it should have beaten.
    """
    found = (
        float_island(build), launch_bound(build, before), memory_bound(build, before, target),
        unaligned(build, before, target), slower_kernel(build, before),
    )  # fmt: skip
    return [text for text in found if text]


def told(causes: Sequence[str]) -> str:
    """The causes as the end of a reason."""
    return f"; why: {'; '.join(causes)}" if causes else ""


def launch_bound(build: Build, before: Build) -> str:
    """Kernels take less than it takes to start one, and there are as many as before."""
    work = [kernel for kernel in build.kernels if kernel.kind not in _OUTSIDE]
    old = [kernel for kernel in before.kernels if kernel.kind not in _OUTSIDE]
    if not work or not math.isfinite(build.ms) or build.ms / len(work) >= LAUNCH_MS or len(work) < 0.9 * len(old):
        return ""
    low, high = (1e6 * value for value in estimate.LAUNCH_S)
    return (f"launch-bound ({len(work)} kernels, before {len(old)}, of {1e3 * build.ms / len(work):.1f} us each, where"
            f" starting one takes {low:g} to {high:g} us: fewer layers help, narrower ones do not)")  # fmt: skip


def memory_bound(build: Build, before: Build, target: Target) -> str:
    """By the target's facts, moving the bytes takes longer than the MACs; without facts, time followed the bytes."""
    per_mac = build.bytes / max(1, build.macs)
    peak, bandwidth = target.peak_macs_per_s.get(build.precision, 0.0), target.bandwidth_bytes_per_s
    if peak and bandwidth:
        moved, computed = build.bytes / bandwidth, build.macs / peak
        if moved <= computed:
            return ""
        return (f"memory-bound ({per_mac:.2g} bytes a MAC, the target computes {peak / bandwidth:.3g} MACs a byte:"
                f" {1e3 * moved:.3g} ms to move, {1e3 * computed:.3g} ms to compute)")  # fmt: skip
    if not (build.ms > 0 and before.ms > 0 and build.macs and before.macs and build.bytes and before.bytes):
        return ""
    macs, moved, times = before.macs / build.macs, before.bytes / build.bytes, before.ms / build.ms
    near = abs(math.log(times / moved)) < 0.5 * abs(math.log(times / macs))
    if not (macs > 1.25 * moved and near):
        return ""
    return (f"memory-bound (MACs {_change(macs)}, moved bytes {_change(moved)}, and the time followed the bytes:"
            f" {_change(times)}; {per_mac:.2g} bytes a MAC)")  # fmt: skip


def _change(ratio: float) -> str:
    """before / after in words."""
    if abs(ratio - 1) < 0.005:
        return "the same"
    return f"{ratio:.2f}x less" if ratio > 1 else f"{1 / ratio:.2f}x more"


def unaligned(build: Build, before: Build, target: Target) -> str:
    """More MACs than before are in layers whose widths fill no whole block."""
    multiple = target.width_multiple(build.precision)
    now, then = (_unaligned(one, multiple) for one in (build, before))
    share, old = (sum(k.macs for k in found) / max(1, one.macs) for found, one in ((now, build), (then, before)))
    if multiple < 2 or share < SHARE or share < old + 0.1:
        return ""
    worst = max(now, key=lambda kernel: kernel.macs)
    example = f"{worst.name or worst.kind}: {worst.channels_in} to {worst.channels_out}"
    return (f"unaligned width ({share:.0%} of the MACs, before {old:.0%}, are in layers with widths that are no"
            f" multiple of {multiple}, such as {example}; round_to = {multiple})")  # fmt: skip


def _unaligned(build: Build, multiple: int) -> list[Kernel]:
    def odd(width: int) -> bool:
        return width > NARROW and width % multiple != 0

    weighted = (kernel for kernel in build.kernels if kernel.macs and kernel.bytes_weights)
    return [kernel for kernel in weighted if odd(kernel.channels_out) or odd(kernel.channels_in)]


def float_island(build: Build) -> str:
    """An INT8 build of which a part of the MACs stayed in float: values are converted on the way in and out."""
    seen = build.inspection
    if build.precision != "int8" or seen is None or seen.int8_macs_share > 1 - SHARE / 2:
        return ""
    left = [name for name, precision in seen.layers.items() if not precision.startswith("int8")]
    names = f", such as {', '.join(left[:3])}" if left else ""
    return (f"float island ({1 - seen.int8_macs_share:.0%} of the MACs stayed in float, {len(left)} of"
            f" {len(seen.layers)} layers{names}; values are converted around them)")  # fmt: skip


def slower_kernel(build: Build, before: Build) -> str:
    """A greater share of the MACs than before is of kinds that compute fewer of them a second."""
    now, then = (_by_kind(one) for one in (build, before))
    grown = {kind: now[kind] - then.get(kind, 0.0) for kind in now if kind in SLOW}
    kind = max(grown, key=lambda name: grown[name], default="")
    if not kind or grown[kind] < SHARE / 2:
        return ""
    rate = ""
    if build.ms > 0 and before.ms > 0:
        rate = f"; {1e-6 * build.macs / build.ms:.3g} GMAC/s altogether, before {1e-6 * before.macs / before.ms:.3g}"
    return f"slower kernel ({now[kind]:.0%} of the MACs are {kind}, before {then.get(kind, 0.0):.0%}{rate})"


def _by_kind(build: Build) -> dict[str, float]:
    shares: dict[str, float] = {}
    for kernel in build.kernels:
        shares[kernel.kind] = shares.get(kernel.kind, 0.0) + kernel.macs / max(1, build.macs)
    return shares
