"""Train the network to give what its teacher gives.

Hinton et al., 2015, arXiv:1503.02531 for logits; for images the mean absolute difference. Labels and reference images
can be added, inner maps too (`nn.losses`, `nn.losses_maps`, `nn.losses_adversarial`, `nn.dreams` name the papers).
Without data the inputs are made up: latents N(0, 1) for inputs without a value range, else smooth random images, which
are no photos: they teach the shape of the function roughly, so that an image network should be given data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from edgegen import graph, training
from edgegen.errors import PassError
from edgegen.passes import _dreams, _lessons
from edgegen.passes._teaching import FROM_OUTPUT, FROM_TEACHER, LOSSES, MAPS, Lesson
from edgegen.training import distributed
from edgegen.types import Job, Model, PassResult

ASKS_QUALITY = ("every", "patience")  # options with which the result depends on `job.quality`


def distill(
    model: Model,
    job: Job,
    *,
    steps: int = 500,
    batch: int = 8,
    lr: float = 1e-3,
    losses: Sequence[str] | Mapping[str, float] = ("output",),
    features: float = 0.0,
    reference: float = 0.0,
    warmup: float = 0.05,
    ema: float = 0.0,
    precision: str = "auto",
    crop: int | None = None,
    temperature: float = 4.0,
    projection: str = "conv",
    encoder: str = "cifar",
    encoder_weights: str = "",
    batchnorm: str = "train",
    grad_clip: float = 1.0,
    optimizer: str = "adamw",
    margin: int = 0,
    feature_layers: Sequence[str] = (),
    noise: float = 0.1,
    views: int = 0,
    accumulate: int = 1,
    scale_lr: bool = False,
    every: int = 0,
    patience: int = 0,
) -> PassResult:
    """Train `model` against `job.teacher` on `job.data` (made-up inputs where there is none).

    Args:
        losses: names, or a table name -> weight, of: output (L1 for images, softened KL for classes), l2, perceptual
            (`encoder`: cifar, mnist, or "file.py:factory" of a network from images in 0..1 to maps, with
            `encoder_weights`), reference (L1 to the sample's reference), reference_l2 (squared),
            reference_psnr (its logarithm for each image: the mean PSNR itself), labels (cross entropy), features (inner
            maps of up to four layers); of the same maps attention (where their energy is), relations (of places to each
            other), contrast (each pixel found among all); discriminator (a small one of the outputs, trained along);
            weights (of layers, whole or factorised, not far from the teacher's); generator (the inner maps of a
            denoiser, or of a generator from latents, which is the step's own teacher). `features` and `reference` add
            those two with a weight.
        crop: train on random squares of this many input pixels (not for classification). margin: input pixels at each
            edge of a crop in which the output is not compared with the reference: it is computed from padding there.
        feature_layers: modules whose outputs the losses of maps compare, names of both networks or "STUDENT=TEACHER";
            none: up to four layers over the depth. A teacher that is asked for nothing else runs no further than the
            last of them.
        noise: with the loss generator, the share of a denoiser's training times at which it sees the images.
        views: learn from so many crops and flips of each sample, chosen once, and keep what the teacher gives for each
            (on disk, 16 bits): it runs once for each of them, and not at every step. 0: others at every step.
        temperature: of the softened logits. projection: "conv" or "orthogonal" (V_kD) from student to teacher maps.
        batchnorm: "train" moves the statistics slowly, "frozen" keeps them. optimizer: adamw, adam, sgd or muon.
        precision: "auto", "bf16", "fp32", or "fp16" on CUDA. accumulate: batches to a step.
        scale_lr: `lr` would suit the teacher; each layer's rate follows from depth, kernel and width
            (`training.scaling`).
        every: evaluate every so many steps and keep the best weights: by `job.quality`, the task's figure on held-out
            images, where there is one (`compress` with data, but for denoisers), else by the losses on four batches
            that are not learned from (other crops, or other made-up inputs). patience: stop after so many evaluations
            that are no better. 0: neither.
    Returns:
        PassResult; `notes` has the loss curve, the inputs, the layers compared, and why training stopped early if so.
    Raises:
        ValueError: an option out of range, outputs of teacher and student that do not fit, a loss without its data.
        PassError: the loss was never finite.
    """
    table = _lessons.weights(losses, features, reference, LOSSES)
    _check(model, job, table, batch, crop, temperature, margin, noise)
    _check_views(views, table)
    if scale_lr and (job.teacher is None or "generator" in table):
        what = "the job has none" if job.teacher is None else "a generator is no such one"
        raise ValueError(f"scale_lr follows from the teacher, and {what}; leave it out")
    job = dataclasses.replace(job, device=distributed.own_device(job.device))
    batch_at, source = _lessons.batches(model, job, batch, crop, views)
    fresh_at = _lessons.batches(model, job, batch, crop)[0] if views else batch_at
    with training.use_threads(job.threads):
        lesson = Lesson(model, job, table, batch_at(0), temperature, projection, (encoder, encoder_weights),
                        margin, feature_layers, noise, views)  # fmt: skip
        rates = lesson.rates(job, batch_at(0), optimizer) if scale_lr else None
    evaluate = _evaluation(model, job, lesson, fresh_at, steps * accumulate) if every or patience else None
    try:
        result = training.train(
            lesson.learner, lesson.losses, batch_at, steps=steps, lr=lr, seed=job.seed, ema=ema, precision=precision,
            checkpoint=job.checkpoints / "distill.safetensors" if job.checkpoints else None, progress=job.progress,
            warmup=warmup, grad_clip=grad_clip, batchnorm=batchnorm, optimizer=optimizer, threads=job.threads,
            device=job.device, accumulate=accumulate, evaluate=evaluate, every=every, patience=patience, rates=rates,
        )  # fmt: skip
    finally:
        lesson.close()
    if result.stopped and not result.steps:
        raise PassError(f"distill: {result.stopped}; check the value ranges of the inputs")
    notes = {
        "inputs": source, "losses": table, "precision": result.precision, "features": list(lesson.names),
        **_lessons.told(result),
    }  # fmt: skip
    if evaluate is not None:
        notes |= {"scores": [list(score) for score in result.scores], "best_step": result.best_step}
    changed = dict.fromkeys(graph.layers(lesson.student), "trained")
    return PassResult(model.with_module(lesson.student.eval()), changed, {}, notes)


def _check(
    model: Model, job: Job, table: Mapping[str, float], batch: int, crop: int | None, temperature: float, margin: int,
    noise: float,
) -> None:  # fmt: skip
    if model.stage.module is None:
        raise ValueError(f"distill needs a network, and {model.name} is an ONNX file; use quantize or cast")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if crop is not None and (crop < 1 or model.task == "classification"):
        raise ValueError(f"crop must be at least 1 pixel and is not for classification, got {crop} for {model.task}")
    if margin < 0 or (margin and (crop is None or 2 * margin >= crop)):
        raise ValueError(f"margin must be 0, or less than half of crop, got {margin} with crop {crop}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must lie in [0, 1], got {noise}")
    if "generator" in table:
        _dreams.check(table, job.teacher, FROM_TEACHER)
    needs = [name for name in table if name in FROM_TEACHER]
    if needs and job.teacher is None:
        raise ValueError(f"losses {', '.join(needs)} need a teacher, and the job has none; use reference or labels")


def _check_views(views: int, table: Mapping[str, float]) -> None:
    if views < 0:
        raise ValueError(f"views must not be negative, got {views}")
    if wrong := [name for name in table if views and name in (*MAPS, "generator")]:
        raise ValueError(f"views keep the teacher's outputs alone: leave out the loss {', '.join(wrong)}, or views")
    if views and not set(table) & set(FROM_OUTPUT):
        told = ", ".join(table)
        raise ValueError(f"views keep the teacher's outputs, and no loss asks for them ({told}): leave them out")


def _evaluation(
    model: Model, job: Job, lesson: Lesson, batch_at: Callable[[int], _lessons.Batch], first: int
) -> Callable[[nn.Module], float]:
    """How good the student is, lower is better: the job's own judgement, or the losses on batches after the last."""
    if (quality := job.quality) is not None:

        def judged(learner: nn.Module) -> float:
            found = quality(model.with_module(graph.clone(lesson.student).to("cpu")))
            return found.value if found.direction == "lower" else -found.value

        return judged

    def losses(learner: nn.Module) -> float:
        batches = _lessons.held_out(batch_at, first, job.device)
        return sum(lesson.distance(batch) for batch in batches) / len(batches)

    return losses
