"""Put something cheaper in the place of self-attention, and train it to give what the attention gave.

ΔConvFusion (Dong et al., 2025, arXiv:2504.21292): a pyramid of convolutions; CLEAR (Liu et al., 2024,
arXiv:2412.16112): attention in a local window; LadaGAN (2024, arXiv:2401.09596): additive attention, linear in the
tokens; Rethinking Attention (Bozic et al., 2023, arXiv:2311.10642): a feed-forward layer. Only the new blocks learn:
each alone against the output of the attention that it replaces, on that attention's own input, then all together
against the network's output.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph, training
from edgegen.errors import PassError
from edgegen.nn import attention, losses, mixers
from edgegen.passes import _alone, _attention, _lessons, _locality
from edgegen.passes._attention import Site
from edgegen.passes.downsample_kv import check_names, relative_error
from edgegen.training import distributed
from edgegen.types import Job, Model, PassResult

KINDS = ("conv", "window", "linear", "ffn")
# Option sets that `edgegen probe` times before any training.
PROBES = tuple({"to": to, "blocks": "all", "steps": 0, "joint_steps": 0} for to in KINDS)
_OTHER = "is in no self-attention over a grid of tokens"


def replace_attention(
    model: Model,
    job: Job,
    *,
    to: str = "conv",
    blocks: str | Sequence[str] = "auto",
    skip: Sequence[str] = (),
    radius: float = 3.0,
    threshold: float = 0.6,
    steps: int = 200,
    joint_steps: int = 50,
    batch: int = 8,
    lr: float = 1e-3,
    window: int = 4,
    levels: int = 2,
    kernel: int = 3,
    hidden: int = 0,
    samples: int = 4,
) -> PassResult:
    """Replace self-attention modules, those that look near by ("auto"), "all", or the named `blocks`.

    Args:
        model: one stage with a module. Not modified; all but the new blocks keeps its weights.
        job: `data` gives the inputs (made up where there is none); `teacher` (else `model`) the outputs that all
            blocks together learn.
        to: "conv" (`levels` resolutions, `kernel` wide), "window" (`radius`, squares of `window` tokens; the old
            weights), "linear" (additive attention) or "ffn" (`hidden` units over the tokens, 0: half of the tokens).
        radius, threshold: "auto" takes an attention if this share of its mass lies within `radius` tokens.
        steps: of each block alone (they learn side by side); joint_steps: of all together, with a third of `lr`. What
            got worse by its training is put back. 0: none.
        samples: inputs on which the locality profile and the errors are measured.
    Returns:
        PassResult; `notes` has the locality profile of every attention, each block's relative squared error before
        and after its training, and that of the network's output.
    Raises:
        ValueError: an option out of range, a name that is no attention, a model without a network.
        PassError: the loss was never finite.
    """
    module = _attention.network(model, "replace_attention")
    _check(to, blocks, radius, threshold, steps, joint_steps, samples, window)
    with training.use_threads(job.threads):
        inputs, _ = _lessons.some_inputs(model, job, samples)
        result = graph.clone(module).eval()
        sites = _attention.find(result, inputs[0])
        named = [] if isinstance(blocks, str) else list(blocks)
        check_names(model, (*named, *skip), sites)
        locality = _locality.profile(result, sites, inputs, radius)
        options = {"radius": radius, "window": window, "levels": levels, "kernel": kernel, "hidden": hidden}
        skipped, fresh = {}, {}
        for path, site in sites.items():
            why = _why_not(site, blocks, skip, locality, radius, threshold)
            made = why or _made(result, site, to, options, job.seed)
            if isinstance(made, str):
                skipped[path] = made
            else:
                fresh[path] = made
    lesson = _Lesson(model, job, result, fresh, batch)
    if fresh:
        before, after = _alone.teach(lesson.original, fresh, inputs, lesson.job.device, lesson.trainer(steps, lr))
        lesson.together(joint_steps, lr)
    changed = {path: f"{to} instead of attention; relative squared error of its output {before[path]:.3g} -> "
                     f"{after[path]:.3g}" for path in fresh}  # fmt: skip
    notes = {
        "locality": locality, "radius": radius, "inputs": lesson.source, "curves": lesson.curves,
        "errors": {path: [before[path], after[path]] for path in fresh}, "stopped": lesson.stopped,
        "together": lesson.told,
        "macs_before": graph.cost(module, inputs[0]).macs, "macs_after": graph.cost(lesson.student, inputs[0]).macs,
        "relative_error": relative_error(module, lesson.student, inputs[0]) if fresh else 0.0,
    }  # fmt: skip
    changed, skipped = _attention.account(module, changed, skipped, _OTHER)
    return PassResult(model.with_module(lesson.student.eval()), changed, skipped, notes, bool(fresh))


def _check(
    to: str, blocks: str | Sequence[str], radius: float, threshold: float, steps: int, joint_steps: int, samples: int,
    window: int,
) -> None:  # fmt: skip
    if to not in KINDS:
        raise ValueError(f"to must be one of {', '.join(KINDS)}, got {to!r}")
    if isinstance(blocks, str) and blocks not in ("auto", "all"):
        raise ValueError(f"blocks must be auto, all or a list of names, got {blocks!r}")
    if not 0 <= threshold <= 1 or not radius > 0:
        raise ValueError(f"threshold must lie in [0, 1] and radius be above 0, got {threshold} and {radius}")
    if min(steps, joint_steps) < 0 or min(samples, window) < 1:
        raise ValueError(f"steps must not be negative, samples and window at least 1, got {steps}, {joint_steps}, "
                         f"{samples}, {window}")  # fmt: skip


def _why_not(
    site: Site, blocks: str | Sequence[str], skip: Sequence[str], locality: Mapping[str, Mapping[str, float]],
    radius: float, threshold: float,
) -> str:  # fmt: skip
    if site.path in skip:
        return "is named in skip"
    if not isinstance(blocks, str) and site.path not in blocks:
        return "not named in blocks"
    if site.problem:
        return site.problem
    if site.y.shape != site.x.shape:
        return "gives another width than it is given"
    share = locality[site.path][f"{radius:g}"]
    if blocks == "auto" and share < threshold:
        return f"looks far: {share:.2f} of its mass lies within {radius:g} tokens, threshold {threshold:g}"
    return ""


def _made(module: nn.Module, site: Site, to: str, options: Mapping[str, Any], seed: int) -> nn.Module | str:
    """The block for a site, or why it cannot be."""
    old: Any = graph.clone(module.get_submodule(site.path))  # the block shares layers with it, and will be trained
    try:
        if to == "window":
            whole = attention.WindowAttention(old, site.grid, site.prefix, options["window"], float(sum(site.grid)))
            if (off := _attention.difference(whole.eval(), site)) > _attention.EXACT:
                return f"is no plain attention: recomputed, it differs by {off:.2g} of its largest output"
            return attention.WindowAttention(
                old, site.grid, site.prefix, options["window"], float(options["radius"])
            ).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            block = _mixer(old, site, to, options)
    except (ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    block.start_from(old)
    return block.eval()


def _mixer(old: Any, site: Site, to: str, options: Mapping[str, Any]) -> mixers.Mixer:
    """A fresh block; where the old module adds its input (which is seen in its output), the new one does too."""
    dim = site.x.shape[1] if site.x.ndim == 4 else site.x.shape[-1]
    value = getattr(old, site.names[-1])
    inner = value.weight.shape[0] // (3 if len(site.names) == 1 else 1)
    adds = bool((site.y - site.x).square().sum() < site.y.square().sum())
    common = {"dim": dim, "inner": inner, "grid": site.grid, "prefix": site.prefix, "residual": adds}
    if to == "conv":
        return mixers.PyramidConv(**common, levels=options["levels"], kernel=options["kernel"])
    if to == "linear":
        return mixers.AdditiveAttention(**common, heads=attention.heads_of(old))
    return mixers.TokenFeedForward(**common, hidden=options["hidden"] or max(1, site.tokens // 2))


class _Lesson:
    """The original network, the new blocks, and how they learn."""

    def __init__(self, model: Model, job: Job, original: nn.Module, fresh: dict[str, nn.Module], batch: int) -> None:
        self.job = dataclasses.replace(job, device=distributed.own_device(job.device))
        self.task, self.fresh = model.task, fresh
        self.original = original.requires_grad_(False)
        self.student = graph.clone(model.stage.module).eval()
        self.curves: dict[str, list[list[float]]] = {}
        self.stopped, self.told = "", ""
        self.batch_at, self.source = _lessons.batches(model, job, batch)

    def trainer(self, steps: int, lr: float) -> Callable[[nn.Module, _alone.Loss], None]:
        """How blocks that learn alone are trained."""
        return lambda learner, loss: self._train("blocks", learner, loss, steps, lr)

    def together(self, steps: int, lr: float) -> None:
        """All blocks in the network, against the teacher's output; everything else is frozen.

        Where they do no better afterwards, on batches that were not learned from, all are as they were before.
        """
        flags = {name: parameter.requires_grad for name, parameter in self.student.named_parameters()}
        trainable = any(flags.values()) or not flags
        for path, block in self.fresh.items():
            _attention.put(self.student, path, block)
        self.student.requires_grad_(False)
        for block in self.fresh.values():
            block.requires_grad_(True)
        if steps:
            start = {path: copy.deepcopy(block.state_dict()) for path, block in self.fresh.items()}
            teacher = self.job.teacher.stage.module if self.job.teacher else None
            teacher = graph.clone(teacher if teacher is not None else self.original).eval().requires_grad_(False)
            loss = self._against(teacher)
            before = self._wrong(loss, steps)
            teacher.to(self.job.device)
            self._train("together", self.student, loss, steps, lr / 3)
            teacher.to("cpu")
            after = self._wrong(loss, steps)
            worse = not after <= before
            self.told = f"loss {before:.3g} -> {after:.3g}{': put back' if worse else ''}"
            for path, block in self.fresh.items() if worse else ():
                block.load_state_dict(start[path])
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(flags.get(name, trainable))

    def _against(self, teacher: nn.Module) -> Callable[[nn.Module, _lessons.Batch, int], torch.Tensor]:
        """The loss of a network to the teacher's output."""

        def loss(module: nn.Module, batch: _lessons.Batch, step: int) -> torch.Tensor:
            with torch.no_grad():
                wanted = graph.flatten(teacher(*batch["input"]))
            pairs = zip(graph.flatten(module(*batch["input"])), wanted, strict=True)
            return torch.stack([self._output(a, b) for a, b in pairs]).mean()

        return loss

    def _wrong(self, loss: Callable[[nn.Module, _lessons.Batch, int], torch.Tensor], first: int) -> float:
        """The loss on the batches after the last one that is learned from; on the CPU, where both networks are then."""
        with torch.no_grad(), training.use_threads(self.job.threads):
            others = _lessons.held_out(self.batch_at, first, "cpu")
            found = [loss(self.student.eval(), batch, 0) for batch in others]
        return float(torch.stack(found).mean())

    def _output(self, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if self.task == "classification":
            return losses.divergence(found, wanted, 4.0)
        return _alone.relative(found, wanted)

    def _train(self, name: str, learner: nn.Module, loss: Any, steps: int, lr: float) -> None:
        if not steps:
            return
        file = self.job.checkpoints / f"{name}.safetensors" if self.job.checkpoints else None
        told = training.train(
            learner, loss, self.batch_at, steps=steps, lr=lr, seed=self.job.seed, checkpoint=file, warmup=0.05,
            progress=self.job.progress, batchnorm="frozen", threads=self.job.threads, device=self.job.device,
        )  # fmt: skip
        if told.stopped and not told.steps:
            raise PassError(f"replace_attention: {told.stopped}; check the value ranges of the inputs")
        self.curves[name] = [list(point) for point in told.curve]
        self.stopped = self.stopped or told.stopped
