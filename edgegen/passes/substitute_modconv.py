"""Make a StyleGAN2 generator mobile: separable modulated convolutions, and the last resolution from wavelets.

Belousov, 2021, MobileStyleGAN, arXiv:2104.04767. Each dense modulated kernel becomes a pointwise and a depthwise one
with the same styles, noise and bias; the last block is replaced by an inverse Haar transform of the image before it and
of nine detail channels. Deviations, so that the dense weights can be used: pointwise comes first (BSConv, Haase and
Amthor, 2020, arXiv:2003.13549), the best rank-one kernel of each output channel; enlarging convolutions run
their pointwise part before the enlargement (the paper: inverse Haar of the features, the same cost); demodulation
follows the style as before; the low band is the image of the block before, skip connections stay. What is left to
learn is the detail (it starts at zero) and the kernels' rest: `distill` after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgegen import graph
from edgegen.nn import modulated
from edgegen.types import Job, Model, PassResult

PROBES: tuple[dict[str, bool], ...] = ({}, {"wavelet": False})  # what `edgegen probe` times before any training


def substitute_modconv(
    model: Model, job: Job, *, skip: Sequence[str] = (), min_size: int = 4, wavelet: bool = True
) -> PassResult:
    """Replace the dense modulated convolutions of a style-based generator, and its last block.

    Args:
        model: one stage with a module; modulated convolutions are `edgegen.nn.modulated.StyledConv`. Not modified.
        skip: convolutions (names) that stay. min_size: those whose output is smaller than this (pixels) stay, too.
        wavelet: put the inverse Haar transform in the place of the last block.
    Returns:
        PassResult; `changed` has each kernel's relative squared error; `notes` the cost before and after.
    Raises:
        ValueError: an option out of range, a name that is no modulated convolution, or a model without a network.
    """
    module = model.stage.module
    if module is None:
        raise ValueError(f"substitute_modconv needs a network, and {model.name} is an ONNX file; use quantize or cast")
    if min_size < 1:
        raise ValueError(f"min_size must be at least 1, got {min_size}")
    result = graph.clone(module).eval()
    found = {name: part for name, part in result.named_modules() if isinstance(part, modulated.StyledConv)}
    for name in skip:
        if name not in found:
            there = ", ".join(found) or "none"
            raise ValueError(f"no modulated convolution {name!r} in {model.name}; there are: {there}")
    last = _last_block(result) if wavelet else ""
    done: dict[str, str] = {}
    kept: dict[str, str] = {}
    if last:
        _put(result, last, _output(result.get_submodule(last)))
        done[last] = "the last resolution comes from wavelets"
    for name, part in found.items():
        if last and name.startswith(f"{last}."):
            continue
        if name in skip or part.config["size"] < min_size:
            kept[name] = "skipped by name" if name in skip else f"its output is smaller than {min_size} pixels"
            continue
        block, error = separated(part)
        _put(result, name, block)
        done[name] = f"dense -> pointwise and depthwise, relative error of the kernel {error:.3g}"
    return _result(model, result, done, kept)


def separated(dense: modulated.StyledConv) -> tuple[modulated.SeparableStyledConv, float]:
    """The separable block nearest to a dense one, and the squared error of its kernel relative to the kernel's square.

    For each output channel, the kernel as a matrix (inputs, places) has a best rank-one part: pointwise x depthwise.
    """
    weight = dense.conv.weight.detach()
    weight = (weight.transpose(0, 1) if dense.up else weight).double()  # (out, in, k, k)
    matrices = weight.flatten(2)  # (out, in, places)
    values, vectors = torch.linalg.eigh(matrices.transpose(1, 2) @ matrices)  # ascending; much quicker than an SVD
    length, best = dense.config["kernel"], vectors[:, :, -1]
    pointwise = (matrices @ best[:, :, None])[:, :, 0]  # (out, in)
    depthwise = best.reshape(-1, 1, length, length)  # unit norm
    error = float(1 - values[:, -1].sum() / matrices.square().sum().clamp_min(1e-30))
    with torch.random.fork_rng(devices=[]):
        block = modulated.SeparableStyledConv(**dense.config)
    state = {name: tensor for name, tensor in dense.state_dict().items() if not name.startswith("conv.")}
    state["pointwise.weight"] = pointwise[:, :, None, None]
    state["depthwise.weight"] = _with_filter(depthwise) if dense.up else depthwise
    block.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return block.to(dense.bias.device, dense.bias.dtype).train(dense.training), error


def _with_filter(kernel: Tensor) -> Tensor:
    """Transposed convolution with `kernel` and then the low-pass filter as one kernel: (C, 1, k, k) to k + 3."""
    low = modulated.fir().to(kernel)
    return F.conv2d(kernel, low.flip(2, 3), padding=3)


def _last_block(module: nn.Module) -> str:
    """The block that makes the last resolution: of those with conv0, conv1 and to_rgb the one of the largest size."""
    blocks = [
        (part.conv1.config["size"], name)
        for name, part in module.named_modules()
        if all(isinstance(getattr(part, child, None), modulated.StyledConv) for child in ("conv0", "conv1"))
        and isinstance(getattr(part, "to_rgb", None), modulated.ToImage)
    ]
    return max(blocks)[1] if blocks else ""


def _output(block: nn.Module) -> modulated.WaveletOutput:
    """The wavelet output in the place of a block: its first convolution's styles, detail zero."""
    first: modulated.StyledConv = block.conv0  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        made = modulated.WaveletOutput(first.config["inputs"], first.config["style"])
    made.detail.affine.load_state_dict(first.affine.state_dict())
    nn.init.zeros_(made.detail.conv.weight)
    return made.to(first.bias.device, first.bias.dtype).train(block.training)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def _result(model: Model, result: nn.Module, done: dict[str, str], kept: dict[str, str]) -> PassResult:
    """The report: each layer under the module that was replaced around it."""

    def of(layer: str, told: dict[str, str]) -> str:
        return next((text for place, text in told.items() if layer == place or layer.startswith(f"{place}.")), "")

    layers = graph.layers(model.stage.module)
    changed = {name: text for name in layers if (text := of(name, done))}
    skipped = {name: of(name, kept) or "is no dense modulated convolution" for name in layers if name not in changed}
    inputs = [x.to("meta") for x in graph.example_inputs(model.stage, seed=0)]  # the count needs no numbers
    before, after = (graph.cost(graph.clone(m).to("meta"), inputs) for m in (model.stage.module, result))
    notes = {"macs_before": before.macs, "macs_after": after.macs, "params_before": before.params,
             "params_after": after.params, "replaced": len(done)}  # fmt: skip
    return PassResult(model.with_module(result), changed, skipped, notes, needs_recovery=bool(changed))
