"""Cut a subnet out: each free width keeps its first channels, as `train_supernet` has ordered and trained them.

Yu et al., 2019, Universally Slimmable Networks, arXiv:1903.05134: the statistics of batch norms are taken anew for the
subnet. The cut is exact: the result is the supernet with the other channels at zero (`_supernet`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from edgegen import graph, registry, training
from edgegen.passes import _free_widths, _lessons, _supernet
from edgegen.passes._free_widths import Width
from edgegen.types import Job, Model, PassResult

BATCH = 8
NOT_PROBED = "its slices have the shapes that prune_channels is probed with"


def slice_widths(
    model: Model,
    job: Job,
    *,
    ratio: float = 0.5,
    ratios: Mapping[str, float] | None = None,
    samples: int = 64,
    round_to: int | None = None,
) -> PassResult:
    """Remove the last channels of each free width.

    Args:
        model: one stage with a module, best after `train_supernet`. Not modified.
        ratio: fraction of channels to remove, in [0, 1). ratios: layer -> ratio of the width that it makes, instead;
            the largest where layers that make one width together have several.
        samples: inputs (job.data, or made up) for the statistics of batch norms.
        round_to: kept widths are rounded up to a multiple of it; None: the target's int8 width.
    Returns:
        PassResult; `changed` has every layer with another width, `skipped` why the others kept theirs, `notes` the MACs
        and parameters before and after.
    Raises:
        ValueError: an option out of range, a layer that does not exist, or a model without a network.
    """
    wanted = dict(ratios or {})
    _check(model, ratio, wanted, samples, round_to)
    module = model.stage.module
    try:
        widths = _free_widths.chain(module)
    except ValueError as error:
        return PassResult(model, {}, dict.fromkeys(graph.layers(module), f"no width is free: {error}"))
    multiple = round_to or job.target.width_multiple("int8")
    space = _supernet.Elastic(tuple(widths), {width.name: (width.full,) for width in widths})
    channels = {width.name: _supernet.kept(width.full, 1 - _ratio(width, ratio, wanted), multiple) for width in widths}
    result = _supernet.cut(module, space, _supernet.Choice(channels)).eval()
    if _supernet.batch_norms(result) and any(channels[width.name] < width.full for width in widths):
        batch_at, _ = _lessons.batches(model, job, BATCH)
        with training.use_threads(job.threads):
            _supernet.estimate(result, [batch_at(i)["input"] for i in range(max(1, samples // BATCH))])
    inputs = graph.example_inputs(model.stage, seed=job.seed, preprocessing=model.preprocessing)
    before, after = graph.cost(module, inputs), graph.cost(result, inputs)
    changed = {name: text for name in graph.layers(module) if (text := _difference(module, result, name))}
    skipped = {name: _reason(name, widths, channels) for name in graph.layers(module) if name not in changed}
    notes = {
        "macs_before": before.macs, "macs_after": after.macs, "params_before": before.params,
        "params_after": after.params, "widths": channels,
    }  # fmt: skip
    return PassResult(model.with_module(result), changed, skipped, notes, bool(changed))


def _ratio(width: Width, ratio: float, ratios: Mapping[str, float]) -> float:
    return max((ratios[name] for name in width.writers if name in ratios), default=ratio)


def _difference(module: nn.Module, result: nn.Module, name: str) -> str:
    """What became of a layer's weight, "" when it kept its shape."""
    layers: list[Any] = [part.get_submodule(name) for part in (module, result)]
    old, new = (tuple(layer.weight.shape) for layer in layers)
    return f"weight {'x'.join(map(str, old))} -> {'x'.join(map(str, new))}" if old != new else ""


def _reason(name: str, widths: list[Width], channels: Mapping[str, int]) -> str:
    own = next((width for width in widths if name in (*width.writers, *width.readers)), None)
    if own is None:
        return "its channels are not free: tied to inputs, outputs or layers that cannot lose any"
    return f"{own.full} channels stay {channels[own.name]}: ratio and rounding"


def _check(model: Model, ratio: float, ratios: Mapping[str, float], samples: int, round_to: int | None) -> None:
    if model.stage.module is None:
        raise ValueError(f"slice_widths needs a network, and {model.name} is an ONNX file; use quantize or cast")
    for name, value in (("ratio", ratio), *((f"ratios of {name}", value) for name, value in ratios.items())):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    if samples < 1 or (round_to is not None and round_to < 1):
        raise ValueError(f"samples and round_to must be at least 1, got {samples} and {round_to}")
    known = tuple(graph.layers(model.stage.module))
    for name in ratios:
        if name not in known:
            raise ValueError(f"no layer {name!r} in {model.name}{registry.near(name, known)}")
