"""The two files of an ncnn network: layers from .param (text), weights and how they are stored from .bin.

.bin holds the weights one after another, in layer order, without names. The large ones begin with a flag of four bytes
that says how they are stored; small ones (biases, norms) are plain float32. What a layer reads follows from its
parameters, as in ncnn's `load_model` of each layer; a file that does not end where it should is not understood.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgegen import errors

_MAGIC = "7767517"
_HALF = 0x01306B47
_FLAGS = {0: ("fp32", "<f4"), _HALF: ("fp16", "<f2"), 0x000D4B38: ("int8", "<i1"), 0x0002C056: ("fp32", "<f4")}
_CONVOLUTIONS = frozenset(
    f"{kind}{groups}{axes}"
    for kind in ("Convolution", "Deconvolution")
    for groups in ("", "DepthWise")
    for axes in ("", "1D", "3D")
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One line of a .param file. Parameters are text by number; arrays (-233xx) keep their own key."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[int, str]

    def number(self, key: int, default: int = 0) -> int:
        """An integer parameter."""
        return int(self.parameters.get(key, default))


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor in a .bin file. storage: fp32, fp16 or int8. large: it has a flag, so its storage is a choice."""

    layer: str
    storage: str
    values: np.ndarray
    large: bool


def layers(param: Path) -> list[Layer]:
    """Every layer of a .param file.

    Raises:
        errors.RuntimeFailed: not an ncnn .param file.
    """
    try:
        lines = param.read_text(encoding="utf-8").splitlines()
        if lines[0].strip() != _MAGIC:
            raise ValueError(f"it begins with {lines[0][:20]!r}")
        found = [_layer(line.split()) for line in lines[2:] if line.strip()]
        if len(found) != int(lines[1].split()[0]):
            raise ValueError(f"it has {len(found)} layers of {lines[1].split()[0]}")
    except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
        raise errors.RuntimeFailed(f"{param.name}: not an ncnn network ({error})") from error
    return found


def _layer(words: Sequence[str]) -> Layer:
    taken, given = int(words[2]), int(words[3])
    names, options = words[4 : 4 + taken + given], words[4 + taken + given :]
    pairs = (option.partition("=") for option in options)
    return Layer(words[0], words[1], tuple(names[:taken]), tuple(names[taken:]), {int(k): v for k, _, v in pairs})


def weights(param: Path, binary: Path) -> list[Weight]:
    """Every tensor of a .bin file, with the layer that it belongs to.

    Raises:
        errors.RuntimeFailed: the file is shorter or longer than its layers say, or stores weights in an unknown way.
    """
    data, at, found = binary.read_bytes(), 0, []
    for layer in layers(param):
        try:
            tensors = _tensors(layer)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise errors.RuntimeFailed(f"{param.name}: {layer.kind} {layer.name}: odd parameters ({error})") from error
        for count, large in tensors:
            storage, kind = "fp32", "<f4"
            if large:
                flag = int.from_bytes(data[at : at + 4], "little")
                if flag not in _FLAGS:
                    raise errors.RuntimeFailed(f"{binary.name}: {layer.kind} {layer.name}: unknown storage {flag:#x}")
                storage, kind = _FLAGS[flag]
                at += 4
            size = count * np.dtype(kind).itemsize
            if at + size > len(data):
                raise errors.RuntimeFailed(f"{binary.name}: ends within {layer.kind} {layer.name}")
            found.append(Weight(layer.name, storage, np.frombuffer(data, kind, count, at), large))
            at += size + -size % 4
    if at != len(data):
        raise errors.RuntimeFailed(f"{binary.name}: {len(data) - at} bytes more than its layers need")
    return found


def _tensors(layer: Layer) -> list[tuple[int, bool]]:
    """(elements, whether a flag comes first) of each tensor that a layer reads, in order."""
    n = layer.number
    if layer.kind in _CONVOLUTIONS:
        dynamic = n(28 if layer.kind.startswith("De") else 19)
        return [] if dynamic else [(n(6), True), *([(n(0), False)] if n(5) else [])]
    if layer.kind == "InnerProduct":
        return [(n(2), True), *([(n(0), False)] if n(1) else [])]
    if layer.kind == "Gemm":
        bias = n(6) and n(10) != -1
        sides = [(n(7) * n(9), n(4)), (n(8) * n(9), n(5)), (_gemm_bias(layer) if bias else 0, bias)]
        return [(count, True) for count, constant in sides if constant]
    if layer.kind == "MultiHeadAttention":
        wide, inner = n(2) // n(0), [n(2), n(0) * n(3, n(0)), n(0) * n(4, n(0))]
        return [*((c, f) for size in inner for c, f in ((size, True), (n(0), False))), (n(2), True), (wide, False)]
    if layer.kind == "MemoryData":
        return [(max(1, n(0)) * max(1, n(1)) * max(1, n(11)) * max(1, n(2)), n(21, 1) == 0)]
    return [(count, False) for count in _small(layer) if count > 0]


def _small(layer: Layer) -> list[int]:
    """Elements of each tensor of a layer that has but float32 vectors."""
    plain = {"Scale": 1, "Bias": 1, "PReLU": 1, "BatchNorm": 4}
    switch = {"LayerNorm": 2, "RMSNorm": 2, "InstanceNorm": 2, "GroupNorm": 3}
    if layer.kind in switch:
        count = layer.number(1 if layer.kind == "GroupNorm" else 0)
        return (1 if layer.kind == "RMSNorm" else 2) * layer.number(switch[layer.kind], 1) * [count]
    if layer.kind == "Normalize":
        return [layer.number(3)]
    if layer.kind in plain:
        bias = layer.kind == "Scale" and bool(layer.number(1))
        return (plain[layer.kind] + bias) * [layer.number(0)]
    return []


def _gemm_bias(layer: Layer) -> int:
    """Elements of Gemm's third operand by its broadcast type: scalar, M, (M, 1), (M, N), (1, N)."""
    rows, columns = layer.number(7), layer.number(8)
    return (1, rows, rows, rows * columns, columns)[layer.number(10)]


def rename(param: Path, names: Mapping[str, str]) -> None:
    """Give layers other names; ncnn reads names of up to 255 characters without spaces."""
    lines = param.read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines[2:], start=2):
        words = line.split()
        if len(words) > 1 and words[1] in names:
            short = "".join(names[words[1]].split())[:200]
            lines[at] = " ".join((f"{words[0]:<24}", f"{short:<24}", *words[2:]))
    param.write_text("\n".join(lines) + "\n", encoding="utf-8")


def halve(param: Path, binary: Path) -> None:
    """Store large weights in FP16, rounded to nearest (pnnx cuts off instead). What FP16 does not hold stays FP32."""
    parts: list[bytes] = []
    for weight in weights(param, binary):
        with np.errstate(over="ignore"):
            half = weight.values.astype("<f2")
        if not weight.large:
            parts.append(weight.values.tobytes())
        elif np.isfinite(half).all():
            parts.append(_HALF.to_bytes(4, "little") + half.tobytes() + b"\0" * (-half.nbytes % 4))
        else:
            parts.append(bytes(4) + weight.values.tobytes())
    binary.write_bytes(b"".join(parts))


def fingerprint(values: np.ndarray) -> str:
    """The same for a weight in another order of axes and in half precision, so that files can be compared."""
    with np.errstate(over="ignore"):
        return hashlib.sha256(np.sort(values.ravel().astype(np.float16)).tobytes()).hexdigest()
