"""What `distill_gan` plays: student, teacher and discriminator with the losses of each; where real images come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from edgegen import graph
from edgegen.nn import discriminators
from edgegen.nn import losses as nn_losses
from edgegen.nn import losses_adversarial as duel
from edgegen.passes import _lessons
from edgegen.passes._reals import reals
from edgegen.types import Job, Model, TensorSpec

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Rules:
    """Weights of the student's losses, how the discriminator is trained, and the steps when each begins."""

    output: float
    features: float
    adversarial: float
    loss: str
    penalty: float
    augment: bool
    conditional: bool
    critic_start: int
    start: int


def is_image(spec: TensorSpec) -> bool:
    """Whether an output is an image (N, 1 or 3, H, W)."""
    return len(spec.shape) == 4 and spec.shape[1] in (1, 3)


def seeded(seed: int, make: Callable[[], Network]) -> Network:
    """A module made with random numbers of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def with_reals(
    batch_at: Callable[[int], _lessons.Batch], model: Model, job: Job, size: int, asked: str
) -> tuple[Callable[[int], dict[str, Any]], str]:
    """The batches with "real" images in the output's value range (None: the teacher's), and which they are.

    Raises:
        ValueError: the data's were asked for, and it has none.
    """
    if asked != "teacher":
        if model.task == "unconditional" and (found := reals(job.data, model)) is not None:

            def drawn(step: int) -> dict[str, Any]:
                return {**batch_at(step), "real": torch.from_numpy(found.drawn(size, [job.seed, 1, step]))}

            return drawn, "data"
        if batch_at(0)["reference"] is not None:

            def referred(step: int) -> dict[str, Any]:
                batch = batch_at(step)
                return {**batch, "real": batch["reference"]}

            return referred, "data"
    if asked == "data":
        raise ValueError("real = data needs real images, and this data has none; use teacher")
    return lambda step: {**batch_at(step), "real": None}, "teacher"


class Game:
    """The three networks, and the loss of each on a batch."""

    def __init__(self, model: Model, job: Job, critic: nn.Module, rules: Rules, online: bool) -> None:
        self.rules, self.critic, self.online = rules, critic, online
        low, high = model.stage.outputs[0].value_range or (0.0, 1.0)
        self.low, self.span, self.unit = low, high - low, isinstance(critic, discriminators.Projected)
        self.student = graph.clone(model.stage.module).to(job.device)
        self.frozen = not any(parameter.requires_grad for parameter in self.student.parameters())
        if self.frozen:  # loaded for inference: then everything learns, and is frozen again afterwards
            self.student.requires_grad_(True)
        original: Any = job.teacher.stage.module if job.teacher else None
        self.teacher = graph.clone(original).eval().to(job.device)
        self.teacher.requires_grad_(online).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def check(self, batch: dict[str, Any]) -> None:
        """Raise ValueError unless the three fit."""
        found, wanted = (graph.outputs(net, batch["input"])[0] for net in (self.student, self.teacher))
        if found.shape != wanted.shape:
            raise ValueError(f"outputs of student {tuple(found.shape[1:])} and teacher {tuple(wanted.shape[1:])} "
                             "differ; distill_gan needs equal shapes")  # fmt: skip
        self.critic.eval()
        try:
            with torch.no_grad():
                maps = self._seen(wanted, batch)[1]
        except RuntimeError as error:
            raise ValueError(f"the discriminator does not take images {tuple(wanted.shape)}: "
                             f"{str(error).splitlines()[0]}") from error  # fmt: skip
        if self.rules.features and not maps:
            raise ValueError("the discriminator has no inner layers whose maps could be compared; give features = 0")

    def _seen(self, images: torch.Tensor, batch: dict[str, Any]) -> discriminators.Seen:
        """What the discriminator makes of images in the output's value range."""
        if self.unit:
            return self.critic((images.float() - self.low) / self.span)
        if self.rules.conditional:
            images = torch.cat([batch["input"][0].to(images.dtype), images], 1)
        return self.critic(images)

    def _taught(self, batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            return graph.flatten(self.teacher(*batch["input"]))[0]

    def _real(self, batch: dict[str, Any], taught: torch.Tensor) -> torch.Tensor:
        return taught if batch["real"] is None else batch["real"].to(taught.dtype)

    def student_loss(self, student: nn.Module, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        """Name -> weighted loss; the discriminator is not moved by it."""
        rules, parts = self.rules, {}
        found, taught = graph.flatten(student(*batch["input"]))[0], self._taught(batch)
        flags = self._hold()
        if rules.output:
            parts["output"] = rules.output * nn_losses.absolute(found, taught, self.span)
        if rules.features:
            with torch.no_grad():
                wanted = self._seen(taught, batch)[1]
            parts["features"] = rules.features * discriminators.feature_distance(self._seen(found, batch)[1], wanted)
        if rules.adversarial and step >= rules.start:
            parts["adversarial"] = rules.adversarial * self._fooling(found, self._real(batch, taught), batch)
        if not parts:  # the adversarial loss is the only one, and it has not begun
            parts["waiting"] = 0.0 * found.float().mean()
        self._release(flags)
        return parts

    def teacher_loss(self, teacher: nn.Module, batch: dict[str, Any], step: int) -> torch.Tensor:
        """The adversarial loss of a teacher that is trained along, and L1 to references where there are any."""
        made, flags = graph.flatten(teacher(*batch["input"]))[0], self._hold()
        loss = self.rules.adversarial * self._fooling(made, self._real(batch, made), batch)
        if batch["reference"] is not None:
            loss = loss + self.rules.output * nn_losses.absolute(made, batch["reference"], self.span)
        self._release(flags)
        return loss

    def _hold(self) -> list[tuple[nn.Parameter, bool]]:
        """Let the discriminator pass gradients on without collecting its own; what to give to `_release`."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.critic.parameters()]
        self.critic.requires_grad_(False)
        return flags

    def _release(self, flags: list[tuple[nn.Parameter, bool]]) -> None:
        for parameter, learns in flags:
            parameter.requires_grad = learns

    def _fooling(self, made: torch.Tensor, real: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        pair = duel.augmented(made, real) if self.rules.augment else [made, real]
        judged = [self._seen(images, batch)[0] for images in pair]
        return duel.maker_loss(self.rules.loss, judged[1], judged[0])

    def critic_loss(self, critic: nn.Module, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        """What the discriminator learns from real and made images, the teacher's among the made when it learns too."""
        with torch.no_grad():
            made = graph.flatten(self.student(*batch["input"]))[0]
        taught = self._taught(batch)
        pairs = [(self._real(batch, taught), made)] + ([(self._real(batch, taught), taught)] if self.online else [])
        parts: dict[str, torch.Tensor] = {}
        for name, (real, fake) in zip(("student", "teacher"), pairs, strict=False):
            images = [side.float() for side in (duel.augmented(real, fake) if self.rules.augment else (real, fake))]
            penal = self.rules.loss == "r3gan" and self.rules.penalty > 0
            images = [side.detach().requires_grad_(penal) for side in images]
            judged = [self._seen(side, batch)[0] for side in images]
            parts[name] = duel.critic_loss(self.rules.loss, *judged) / len(pairs)
            if penal:
                slopes = [duel.gradient_penalty(score, side) for score, side in zip(judged, images, strict=True)]
                parts[f"{name} R1 and R2"] = 0.5 * self.rules.penalty * torch.stack(slopes).sum() / len(pairs)
        return parts

    def close(self) -> None:
        """Freeze the student again if it was."""
        if self.frozen:
            self.student.requires_grad_(False)
