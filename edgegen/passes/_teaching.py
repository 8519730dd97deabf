"""What `distill` teaches: teacher, student and what is learned beside it, with the loss of one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph, training
from edgegen.nn import losses as nn_losses
from edgegen.nn import losses_adversarial, losses_maps
from edgegen.passes import _dreams, _lessons, _own, _views
from edgegen.training import scaling
from edgegen.types import Job, Model

MAPS = ("features", *losses_maps.KINDS)
LOSSES = (
    "output", "l2", "perceptual", "reference", "reference_l2", "reference_psnr", "labels", *MAPS, "discriminator",
    "weights", "generator",
)  # fmt: skip
FROM_OUTPUT = ("output", "l2", "perceptual", "discriminator")
FROM_TEACHER = (*FROM_OUTPUT, *MAPS, "weights")
_TO_REFERENCE = {
    "reference": nn_losses.absolute, "reference_l2": nn_losses.squared, "reference_psnr": nn_losses.decibels,
}  # fmt: skip


class Lesson:
    """Teacher, student and what is learned beside it, with the loss of one batch."""

    def __init__(
        self, model: Model, job: Job, table: Mapping[str, float], first: _lessons.Batch, temperature: float,
        projection: str, encoder: tuple[str, str], margin: int = 0, feature_layers: Sequence[str] = (),
        noise: float = 0.1, views: int = 0,
    ) -> None:  # fmt: skip
        self.margin = margin
        self.table, self.temperature, self.task = table, temperature, model.task
        low, high = model.stage.outputs[0].value_range or (0.0, 1.0)
        self.low, self.span = low, high - low
        self.student = graph.clone(model.stage.module).to(job.device)
        self.frozen = not any(parameter.requires_grad for parameter in self.student.parameters())
        if self.frozen:  # loaded for inference: then everything learns, and is frozen again afterwards
            self.student.requires_grad_(True)
        inputs = training.place(first["input"], job.device)
        self.views = views * len(job.data) if views and job.data is not None else 0
        self.folder = job.checkpoints
        self.kept: _views.Kept | None = None
        self.teacher: Any = _teacher(job) if any(name in FROM_TEACHER for name in table) else None
        _check_data(table, first)
        if self.teacher is not None:
            _check_fit(self.student, self.teacher, inputs)
        self.encoder: Any = None
        if "perceptual" in table:
            self.encoder = _frozen(_own.encoder(*encoder, job.seed), job.device)
        self.names: tuple[str, ...] = ()
        self.maps: dict[str, nn_losses.FeatureLoss] = {}
        self.learner = nn.ModuleDict({"student": self.student})
        self.weighed: tuple[str, ...] = ()
        if "weights" in table and self.teacher is not None:
            self.weighed = losses_maps.weight_pairs(self.student, self.teacher)
        if "weights" in table and not self.weighed:
            raise ValueError("no layer of the student stands for a matrix of its teacher's; leave out the loss weights")
        self.dream: _dreams.Dream | None = None
        if "generator" in table and job.teacher is not None:
            self.dream = _dreams.Dream(model, self.student, job.teacher, inputs, noise, job.seed)
            self.names, self.learner["pyramid"] = self.dream.names, self.dream.pyramid
        if "discriminator" in table:
            self._judge(inputs, job.seed)
        if set(MAPS) & set(table):
            self._pair(inputs, projection, job.seed, feature_layers)

    def _judge(self, inputs: Sequence[torch.Tensor], seed: int) -> None:
        """Make a discriminator for each output."""
        outputs = graph.outputs(self.teacher, inputs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.learner["discriminator"] = nn.ModuleList(
                losses_adversarial.OutputDiscriminator(tuple(out.shape[1:]), self.task == "classification")
                for out in outputs
            ).to(inputs[0].device)

    def _pair(self, inputs: Sequence[torch.Tensor], projection: str, seed: int, named: Sequence[str]) -> None:
        """Choose the layers to compare and make the projections, with random numbers of their own."""
        widths = nn_losses.named_pairs(self.student.eval(), self.teacher, inputs, named)
        self.names = tuple(widths) or nn_losses.pairs(self.student, self.teacher, inputs)
        kinds = [kind for kind in MAPS if kind in self.table]
        if not self.names:
            raise ValueError("no layer of the student has a map of the size of one of the teacher's; "
                             f"leave out the loss {', '.join(kinds)}")  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for kind in kinds:
                self.maps[kind] = (
                    nn_losses.FeatureLoss(self.student, self.teacher, self.names, projection, widths)
                    if kind == "features"
                    else losses_maps.MapLoss(kind, self.student, self.teacher, self.names, widths)
                )
        if not set(FROM_OUTPUT) & set(self.table):
            theirs = [nn_losses.sides(name)[1] for name in self.names]
            self.teacher = _UpTo(self.teacher, _last_called(self.teacher, theirs, inputs))
        self.learner.update(self.maps)

    def rates(self, job: Job, first: _lessons.Batch, optimizer: str) -> dict[str, float]:
        """Name in the learner -> factor of the learning rate, where `lr` would suit the teacher."""
        base = _teacher(job)
        inputs = training.place(first["input"], job.device)
        found = scaling.rates(self.student, base, inputs, optimizer)
        return {f"student.{name}": value for name, value in found.items()}

    def distance(self, batch: _lessons.Batch) -> float:
        """The sum of the losses of a batch, without the discriminator's, which has no fixed scale."""
        parts = self.losses(self.learner, batch, 0)
        return float(sum(part.item() for name, part in parts.items() if name != "discriminator"))

    def losses(self, learner: nn.Module, batch: _lessons.Batch, step: int) -> dict[str, torch.Tensor]:
        """Name -> weighted loss of a batch."""
        given = batch["input"] if self.dream is None else self.dream.inputs(batch["input"], step)
        found = graph.flatten(self.student(*given))
        taught = found if self.teacher is None else self._taught(batch)
        return {name: weight * self._loss(name, found, taught, batch) for name, weight in self.table.items()}

    @torch.no_grad()
    def _taught(self, batch: _lessons.Batch) -> tuple[torch.Tensor, ...]:
        """The teacher's outputs, of a view that it has seen those from then."""

        def teach(rows: Any = slice(None)) -> tuple[torch.Tensor, ...]:
            return graph.flatten(self.teacher(*(value[rows] for value in batch["input"])))

        if "view" not in batch:
            return teach()
        if self.kept is None:
            self.kept = _views.Kept(self.folder, self.views, [tuple(out.shape[1:]) for out in teach(slice(1))])
        return self.kept.of(batch["view"], teach)

    def _loss(
        self, name: str, found: Sequence[torch.Tensor], taught: Sequence[torch.Tensor], batch: _lessons.Batch
    ) -> torch.Tensor:
        if name in self.maps:
            return self.maps[name]()
        if name == "generator" and self.dream is not None:
            return self.dream.loss()
        if name == "weights":
            teacher = self.teacher.network if isinstance(self.teacher, _UpTo) else self.teacher
            return losses_maps.weight_distance(self.student, teacher, self.weighed)
        if name == "labels":
            return nn_losses.cross_entropy(found[0], batch["label"])
        if name in _TO_REFERENCE:
            return _TO_REFERENCE[name](*self._inner(found[0], batch), self.span)
        if name == "discriminator":
            judges: Any = self.learner["discriminator"]
            parts = [judge.loss(a, b) for judge, a, b in zip(judges, found, taught, strict=True)]
        else:
            parts = [self._compare(name, a, b) for a, b in zip(found, taught, strict=True)]
        return torch.stack(parts).mean()

    def _inner(self, found: torch.Tensor, batch: _lessons.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and reference without the margin: at the edges of a crop the network sees padding, not the image."""
        reference = batch["reference"]
        cut = self.margin * (reference.shape[-1] // batch["input"][0].shape[-1]) if self.margin else 0
        return (found[..., cut:-cut, cut:-cut], reference[..., cut:-cut, cut:-cut]) if cut else (found, reference)

    def _compare(self, name: str, found: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """One output of the student against the teacher's."""
        if name == "perceptual":
            a, b = ((out - self.low) / self.span for out in (found, taught))
            return nn_losses.perceptual(self.encoder, a, b)
        if name == "output" and self.task == "classification":
            return nn_losses.divergence(found, taught, self.temperature)
        return (nn_losses.squared if name == "l2" else nn_losses.absolute)(found, taught, self.span)

    def close(self) -> None:
        """Take the hooks off the student, which is the result, and freeze it again if it was."""
        if self.frozen:
            self.student.requires_grad_(False)
        for maps in (*self.maps.values(), *((self.dream,) if self.dream else ())):
            maps.close()
        if self.kept is not None:
            self.kept.close()


def _last_called(network: nn.Module, names: Sequence[str], inputs: Sequence[torch.Tensor]) -> str:
    """Which of these modules runs last."""
    order: list[str] = []
    parts = [(name, network.get_submodule(name)) for name in names]
    handles = [part.register_forward_hook(lambda *_, name=name: order.append(name)) for name, part in parts]
    with graph.hooked(handles):
        graph.outputs(network, inputs)
    return order[-1]


class _UpTo(nn.Module):
    """A network that stops after one of its modules; its own outputs are not computed."""

    class _Enough(Exception):
        pass

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network = network
        network.get_submodule(name).register_forward_hook(self._stop)  # after the hook that catches the map

    def _stop(self, module: nn.Module, args: Any, out: Any) -> None:
        raise self._Enough

    def forward(self, *inputs: torch.Tensor) -> tuple[()]:
        with contextlib.suppress(self._Enough):
            self.network(*inputs)
        return ()


def _teacher(job: Job) -> nn.Module:
    """A frozen copy of the teacher: hooks and memory layout must not reach the caller's."""
    module = job.teacher.stage.module if job.teacher else None
    if module is None:
        raise ValueError("the teacher has no network (an ONNX file cannot teach); give the torch model")
    return _frozen(graph.clone(module), job.device)


def _frozen(module: nn.Module, device: str) -> nn.Module:
    frozen = module.eval().requires_grad_(False).to(device=device)
    return frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _check_data(table: Mapping[str, float], first: _lessons.Batch) -> None:
    for name, key in (*((name, "reference") for name in _TO_REFERENCE), ("labels", "label")):
        if name in table and first[key] is None:
            raise ValueError(f"loss {name} needs samples with a {key}, and this data has none; leave it out")


def _check_fit(student: nn.Module, teacher: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """One clear line when the two networks cannot be compared."""
    found = [tuple(out.shape[1:]) for out in graph.outputs(student, inputs)]
    wanted = [tuple(out.shape[1:]) for out in graph.outputs(teacher, inputs)]
    if found != wanted:
        raise ValueError(f"outputs of student {found} and teacher {wanted} differ; distill needs equal shapes")
