"""A denoiser or another generator of images as the teacher of any network of images (`nn.dreams` names the paper).

A denoiser looks at the student's images with some noise on them. A generator that makes its images in one run teaches
with those: the student sees them in place of the data's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from edgegen import graph, samplers
from edgegen.nn import diffusion, dreams
from edgegen.passes._game import seeded
from edgegen.types import Model, TensorSpec


class Dream:
    """A generator, the student's maps and its own of one batch, and the pyramid between them, which learns along."""

    def __init__(
        self, model: Model, student: nn.Module, generator: Model, inputs: Sequence[torch.Tensor], noise: float,
        seed: int,
    ) -> None:  # fmt: skip
        """noise: share of a denoiser's training times. Raises ValueError for a student of no images or no maps."""
        self.denoises = samplers.of(generator.options) is not None
        if len(model.stage.inputs) != 1 or len(model.stage.inputs[0].shape) != 4:
            raise ValueError(f"loss generator is for networks of one image, and {model.name} takes something else")
        self.model, self.generator, self.seed, self.noise = model, generator, seed, noise
        self.spec = generator.stage.inputs[0] if self.denoises else generator.stage.outputs[0]
        self.network = graph.clone(generator.stage.module).eval().requires_grad_(False).to(inputs[0].device)
        first = self._given(inputs, 0)
        theirs = dreams.stages(self.network, lambda: graph.outputs(self.network, first))
        ours = dreams.stages(student, lambda: graph.outputs(student, inputs))
        if not theirs or not ours:
            raise ValueError(f"{(model if theirs else generator).name} has no inner maps (N, C, H, W); leave out the "
                             "loss generator")  # fmt: skip
        self._ours, self._theirs = dreams.Caught(student, ours), dreams.Caught(self.network, theirs)
        self.names = tuple(name for name, _ in theirs.values())
        sides = ({size: channels for size, (_, channels) in found.items()} for found in (ours, theirs))
        self.pyramid = seeded(seed, lambda: dreams.Pyramid(*sides)).to(inputs[0].device)

    @torch.no_grad()
    def inputs(self, inputs: Sequence[torch.Tensor], step: int) -> tuple[torch.Tensor, ...]:
        """Run the generator; what the student is to be run on, before `loss`."""
        made = self.network(*self._given(inputs, step))
        if self.denoises:
            return tuple(inputs)
        how, spec = self.model.preprocessing, self.model.stage.inputs[0]
        return (graph.normalise(_between(graph.flatten(made)[0].float(), self.spec, spec), how),)

    def loss(self) -> torch.Tensor:
        """Of the maps of the last run of both."""
        found = self.pyramid(self._ours.maps)
        return dreams.distance(found, [self._theirs.maps[size] for size in self.pyramid.wanted])

    def close(self) -> None:
        """Take the hooks off the student, which is the result."""
        self._ours.close()

    def _given(self, inputs: Sequence[torch.Tensor], step: int) -> tuple[torch.Tensor, ...]:
        """What the generator is run on: a function of the images, the seed and the step."""
        rng = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        device, count = inputs[0].device, len(inputs[0])
        if not self.denoises:
            drawn = (graph.example_input(spec, rng, batch=count) for spec in self.generator.stage.inputs)
            return tuple(value.to(device) for value in drawn)
        levels = diffusion.Levels(self.generator.options)
        images = graph.unnormalise(inputs[0].float(), self.model.preprocessing)
        x0 = _between(images, self.model.stage.inputs[0], self.spec)
        t = torch.full((count,), float(round(self.noise * (levels.count - 1))), device=device)
        eps = torch.randn(x0.shape, generator=rng).to(device)
        label = (torch.full((count,), float(levels.labels), device=device),) if levels.labels else ()
        return (levels.noised(x0, t, eps), t, *label)


def _between(images: torch.Tensor, source: TensorSpec, target: TensorSpec) -> torch.Tensor:
    """Images of one network as another takes them: range, channels (1 or 3) and size."""
    (low, high), (start, end) = (spec.value_range or (-1.0, 1.0) for spec in (source, target))
    images = (images - low) / (high - low) * (end - start) + start
    channels, height, width = (graph.FREE_SIZE if isinstance(n, str) else int(n) for n in target.shape[1:])
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False, antialias=True)


def check(table: Iterable[str], generator: Model | None, taught: Sequence[str]) -> None:
    """One clear line where the other losses cannot be beside `generator`; taught: those of a teacher of the same kind.

    Raises:
        ValueError: no teacher, or a loss of another teacher, or of the data beside images that the generator makes.
    """
    own = generator is not None and samplers.of(generator.options) is None
    if generator is None or generator.stage.module is None or (own and generator.task != "unconditional"):
        found = "the job has none" if generator is None else f"{generator.name} is none"
        raise ValueError(
            f"loss generator needs a denoiser or a generator from latents as the step's teacher, and {found}"
        )
    if wrong := [name for name in table if name != "generator" and (own or name in taught)]:
        why = "makes the images that are learned from" if own else "is a denoiser"
        raise ValueError(f"{generator.name} {why}: loss {', '.join(wrong)} cannot be beside the loss generator; give "
                         "it a step of its own")  # fmt: skip
