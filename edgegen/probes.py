"""Small networks whose times tell what operators cost: one operator repeated, or a block of those that go together.

A probe is JSON: {"name", "input": [1, C, H, W], "layers": [["conv", out, window, stride, groups, activation], ...]}.
Operators are repeated where shapes allow, so that copies to and from numpy do not hide them, and blocks keep the
layouts and fusions that whole networks have. `sample` draws sizes of real networks, stratified: every prefix of its
list holds all strata in turn, so a budget may cut it anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgegen.operators import Kernel

if TYPE_CHECKING:
    from edgegen.types import Stage

Probe = dict[str, Any]
Layers = list[list[Any]]
_WIDTHS = (16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512)
_SPACES = (7, 8, 14, 16, 28, 32, 56, 64, 112, 128)
_MACS = (2e6, 2.5e8)  # of one probe; between 0.1 and 10 ms on common processors
_ACTS = ("relu", "relu", "relu6", "silu", "hardswish", "gelu", "leaky", "")


def sample(count: int, seed: int = 0) -> list[Probe]:
    """`count` probes, always the same ones for a seed; a longer list begins with a shorter one."""
    found: list[Probe] = [_probe("empty", [1, 1, 1, 1], [["act", "relu"]])]
    number = 0
    while len(found) < count:
        for make in STRATA:
            number += 1
            made = make(random.Random(f"{seed} {number}"))
            if make not in LARGE:  # a small output: whether large ones cost page faults depends on what ran before
                made["layers"] = [*made["layers"], ["mean"] if len(made["input"]) == 3 else ["pool", "global"]]
            found.append({**made, "name": f"{make.__name__.strip('_')} {number}"})
    return found[:count]


def of_kernels(kernels: Sequence[Kernel]) -> list[Probe]:
    """One probe for each different weighted kernel of a network; matrices of computed operands have none."""
    found: dict[str, Probe] = {}
    for k in kernels:
        strided = (k.height * k.stride, k.width * k.stride)
        if k.kind == "linear":
            made = _probe("linear", [1, max(1, k.height), k.channels_in], [["linear", k.channels_out, ""]])
        elif k.kind == "transposed":
            layer = ["transposed", k.channels_out, k.kernel[0], k.stride, ""]
            made = _probe("transposed", [1, k.channels_in, k.height // k.stride, k.width // k.stride], [layer])
        elif k.kind in ("conv1x1", "conv3x3", "conv", "depthwise", "grouped"):
            layer = ["conv", k.channels_out, k.kernel[0], k.stride, k.groups, "relu"]
            made = _probe(k.kind, [1, k.channels_in, *strided], [layer])
        else:
            continue
        label = f"{k.kind} {'x'.join(map(str, made['input'][1:]))} {made['layers'][0][1:]}"
        found[label] = {**made, "name": label}
    return list(found.values())


def _probe(name: str, shape: list[int], layers: Layers) -> Probe:
    return {"name": name, "input": shape, "layers": layers}


def _within(rng: random.Random, draw: Callable[[], tuple[Probe, float]]) -> Probe:
    """The first of some draws whose MACs are in range, else the nearest."""
    tries = [draw() for _ in range(40)]
    good = [probe for probe, macs in tries if _MACS[0] <= macs <= _MACS[1]]
    return good[0] if good else min(tries, key=lambda entry: abs(entry[1] - _MACS[1]))[0]


def _size(rng: random.Random, widths: Sequence[int], spaces: Sequence[int], most: float = 2e5) -> tuple[int, int]:
    """A width and a space whose tensor has at most `most` elements."""
    pairs = [(width, space) for width in widths for space in spaces if width * space**2 <= most]
    return rng.choice(pairs)


def _conv(rng: random.Random, window: int, stride: int = 1, acts: tuple[str, ...] = _ACTS) -> Probe:
    def draw() -> tuple[Probe, float]:
        into, space = _size(rng, _WIDTHS, _SPACES, 8e5)
        out = rng.choice((into, into, rng.choice(_WIDTHS)))
        act = rng.choice(acts)
        times = rng.choice((1, 2, 4)) if stride == 1 else 1
        layers: Layers = [["conv", out, window, stride, 1, act]]
        macs = into * out * window**2 * (space // stride) ** 2.0
        for number in range(1, times):
            layers.append(["conv", into if number % 2 else out, window, 1, 1, act])
        return _probe("", [1, into, space, space], layers), macs * times

    return _within(rng, draw)


def _conv3(rng: random.Random) -> Probe:
    return _conv(rng, 3)


def _conv1(rng: random.Random) -> Probe:
    return _conv(rng, 1)


def _strided(rng: random.Random) -> Probe:
    return _conv(rng, rng.choice((3, 3, 1, 4, 2)), 2)


def _large(rng: random.Random) -> Probe:
    """Stems and tails: few channels, large windows, large images."""
    window, space = rng.choice((3, 5, 7, 9)), rng.choice((64, 128, 224, 256))
    if rng.random() < 0.6:
        stem = ["conv", rng.choice((16, 32, 64)), window, rng.choice((1, 2)), 1, "relu"]
        return _probe("", [1, 3, space, space], [stem])
    width = rng.choice((16, 32, 64))
    return _probe("", [1, width, space // 2, space // 2], [["conv", rng.choice((3, 12, 48)), window, 1, 1, ""]])


def _depthwise(rng: random.Random) -> Probe:
    width, space = _size(rng, (*_WIDTHS, 640, 960), _SPACES, 8e5)
    act, window = rng.choice(_ACTS), rng.choice((3, 3, 5, 7))
    layers: Layers = [["conv", width, window, 1, width, act] for _ in range(3)]
    return _probe("", [1, width, space, space], [*layers, ["conv", width, window, rng.choice((1, 2)), width, act]])


def _heavy(rng: random.Random) -> Probe:
    """Weights that fill the caches."""
    width, space = _size(rng, (192, 256, 320, 384, 512), (7, 8, 14, 16, 28), 2.1e5)
    out = rng.choice((width, width, min(640, 2 * width)))
    layers: Layers = [["conv", out, rng.choice((1, 3, 3)), 1, 1, "relu"]]
    return _probe("", [1, width, space, space], layers + layers[: rng.choice((0, 1))])


def _grouped(rng: random.Random) -> Probe:
    each, groups, space = rng.choice((8, 16, 24, 32)), rng.choice((2, 4, 8, 16)), rng.choice(_SPACES[:7])
    return _probe("", [1, each * groups, space, space], [["conv", each * groups, 3, 1, groups, "relu"]] * 2)


def _inverted(rng: random.Random) -> Probe:
    """MobileNet and EfficientNet blocks, some with squeeze and excitation."""
    (width, space), act = _size(rng, _WIDTHS[:11], _SPACES[:8], 6e4), rng.choice(("relu6", "hardswish", "silu"))
    wide, window = width * rng.choice((3, 4, 6)), rng.choice((3, 5))
    gate: Layers = [["excite", 4]] if rng.random() < 0.4 else []
    body = [["conv", wide, 1, 1, 1, act], ["conv", wide, window, 1, wide, act], *gate, ["conv", width, 1, 1, 1, ""]]
    down = [["conv", wide, 1, 1, 1, act], ["conv", wide, window, 2, wide, act], ["conv", width, 1, 1, 1, ""]]
    return _probe("", [1, width, space, space], [["residual", body, ""], *down])


def _basic(rng: random.Random) -> Probe:
    (width, space), act = _size(rng, _WIDTHS[:14], _SPACES[:8]), rng.choice(("relu", "leaky", "silu"))
    body = [["conv", width, 3, 1, 1, act], ["conv", width, 3, 1, 1, ""]]
    return _probe("", [1, width, space, space], [["residual", body, act]] * rng.choice((1, 2)))


def _bottleneck(rng: random.Random) -> Probe:
    (width, space), groups = _size(rng, (64, 128, 256, 512), (7, 14, 28, 56), 4e5), rng.choice((1, 1, 4, 8))
    inner = width // rng.choice((1, 2, 4))
    body = [["conv", inner, 1, 1, 1, "relu"], ["conv", inner, 3, 1, groups, "relu"], ["conv", width, 1, 1, 1, ""]]
    return _probe("", [1, width, space, space], [["residual", body, "relu"]])


def _transformer(rng: random.Random) -> Probe:
    heads, tokens = rng.choice((2, 3, 4, 6)), rng.choice((49, 64, 100, 196))
    width = heads * rng.choice((32, 64))
    act = rng.choice(("gelu", "relu", "silu"))
    layers: Layers = [["residual", [["layernorm"], ["attention", heads]], ""]]
    layers += [["residual", [["layernorm"], ["linear", 4 * width, act], ["linear", width, ""]], ""]]
    return _probe("", [1, tokens, width], layers)


def _linear(rng: random.Random) -> Probe:
    into, out = rng.choice((128, 256, 512, 768, 1024, 1280)), rng.choice((10, 100, 512, 1000))
    rows = rng.choice((1, 1, 1, 16, 64))
    return _probe("", [1, rows, into], [["linear", out, rng.choice(("", "relu"))], ["linear", into, ""]])


def _convnext(rng: random.Random) -> Probe:
    width, space = _size(rng, (32, 40, 64, 80, 96, 160, 192, 320), (7, 14, 28, 56), 1.3e5)
    body = [["conv", width, 7, 1, width, ""], ["last"], ["layernorm"], ["linear", 4 * width, "gelu"],
            ["linear", width, ""], ["first"]]  # fmt: skip
    return _probe("", [1, width, space, space], [["residual", body, ""]])


def _enlarge(rng: random.Random) -> Probe:
    (width, space), act = _size(rng, (16, 32, 64, 128), (8, 16, 32, 64), 7e4), rng.choice(("relu", "leaky"))
    how = rng.choice(("transposed", "nearest", "bilinear", "shuffle"))
    up: Layers = [["resize", 2, how], ["conv", width // 2, 3, 1, 1, act]]
    if how == "transposed":
        up = [["transposed", width // 2, rng.choice((2, 4)), 2, act]]
    elif how == "shuffle":
        up = [["conv", 4 * width, rng.choice((1, 3)), 1, 1, ""], ["shuffle", 2]]
    return _probe("", [1, width, space, space], [["conv", width, 1, 1, 1, act], *up])


def _normed(rng: random.Random) -> Probe:
    """Image generators: reflected padding and instance or group norm between convolutions."""
    (width, space), how = _size(rng, (16, 32, 64, 96), (16, 32, 64, 128), 6e5), rng.choice(("instance", "group"))
    body: Layers = [["pad", 1]] if rng.random() < 0.5 else []
    window = rng.choice((1, 3)) if not body else 3
    body += [["conv", width, window, 1, -1 if body else 1, ""], ["norm", how], ["act", rng.choice(("relu", "silu"))]]
    return _probe("", [1, width, space, space], body * rng.choice((1, 2)))


def _pooled(rng: random.Random) -> Probe:
    width, space = _size(rng, _WIDTHS, _SPACES[2:], 1e6)
    how = rng.choice(("max 3", "max 2", "avg 2", "avg 3"))
    layers: Layers = [["conv", width, 1, 1, width, "relu"], ["pool", how], ["pool", "global"]]
    layers.append(["conv", 4 * width, 1, 1, 1, ""])
    return _probe("", [1, width, space, space], layers)


def _elementwise(rng: random.Random) -> Probe:
    width, space = _size(rng, _WIDTHS, _SPACES[2:], 5e5)
    acts = rng.sample(("relu", "silu", "hardswish", "gelu", "sigmoid", "tanh", "leaky", "softmax"), 3)
    return _probe("", [1, width, space, space], [["residual", [["act", act]], ""] for act in acts])


def _moved(rng: random.Random) -> Probe:
    """DenseNet's concatenation, ShuffleNet's shuffle, transposes."""
    width, space = _size(rng, (16, 32, 64, 128, 256), (8, 14, 16, 28, 32, 56, 64))
    grown = [["conv", width // 2, rng.choice((1, 3)), 1, 1, "relu"]]
    more: Layers = rng.choice(([["mix", 2]], [["last"], ["layernorm"], ["first"]], [["concat", grown]]))
    return _probe("", [1, width, space, space], [["concat", grown], *more])


def _copied(rng: random.Random) -> Probe:
    """Little work on a large input or output: what copies cost."""
    width, space = rng.choice((1, 3, 16, 64)), rng.choice((32, 64, 128, 224))
    return _probe("", [1, width, space, space], rng.choice(([["pool", "global"]], [["act", "relu"]])))


STRATA = (
    _conv3, _conv1, _inverted, _basic, _transformer, _depthwise, _strided, _bottleneck, _large, _copied, _normed,
    _linear, _convnext, _enlarge, _grouped, _heavy, _elementwise, _pooled, _moved, _conv1, _inverted, _conv3, _enlarge,
)  # fmt: skip
LARGE = (_copied, _large, _enlarge)


def stage(probe: Probe, seed: int = 0) -> Stage:
    """The probe as a torch network with random weights, in eval mode."""
    import torch

    from edgegen.nn import probes
    from edgegen.types import Stage, TensorSpec

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = probes.network(probe["input"], probe["layers"]).eval()
    return Stage("main", module, (TensorSpec("input", tuple(probe["input"])),), ())


def names(probes: Sequence[Probe]) -> Iterator[str]:
    """Their names, in order."""
    return (str(probe["name"]) for probe in probes)
