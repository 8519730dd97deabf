"""Train a small generator against its teacher and a discriminator that both are judged by.

DCD (Hu et al., 2023, Discriminator-Cooperated Feature Map Distillation for GAN Compression, arXiv:2212.14169): what the
discriminator sees in the teacher's and in the student's image is matched, and the discriminator is trained again with
the student. Deviation: squared errors relative to the teacher's instead of its perceptual and texture losses. Where
there is no discriminator of the teacher, a projected one is made (`nn.discriminators`). Losses of the two players:
`nn.losses_adversarial`. The outputs and the maps are learned first, adversarial losses begin later. `online` trains the
teacher along, as OMGD (Ren et al., 2021, arXiv:2108.06908) and UGC (arXiv:2309.09310) do, so that the student follows a
teacher that is ahead by little; deviation: one network of the student's ancestry, the original itself.

Unconditional generators learn from latents, teacher and student from the same ones; image-to-image networks from
`job.data`. Real images are the data's where it has any; else the teacher's samples are taken as real (data-free).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from edgegen import graph, training
from edgegen.errors import PassError
from edgegen.nn import discriminators, encoders
from edgegen.nn.losses_adversarial import ADVERSARIAL
from edgegen.passes import _game, _lessons, _own
from edgegen.training import adversarial as turns
from edgegen.training import distributed
from edgegen.types import Job, Model, PassResult

BETAS = (0.5, 0.99)
REAL = ("auto", "teacher", "data")


def distill_gan(
    model: Model,
    job: Job,
    *,
    steps: int = 1000,
    batch: int = 16,
    lr: float = 5e-4,
    critic_lr: float = 1e-3,
    output: float = 1.0,
    features: float = 1.0,
    adversarial: float = 0.1,
    adversarial_after: float = 0.5,
    loss: str = "hinge",
    penalty: float = 1.0,
    augment: bool = True,
    discriminator: str = "",
    discriminator_weights: str = "",
    conditional: bool = False,
    encoder: str = "",
    real: str = "auto",
    online: bool = False,
    ema: float = 0.99,
    warmup: float = 0.02,
    precision: str = "auto",
    batchnorm: str = "train",
    grad_clip: float = 1.0,
    crop: int | None = None,
) -> PassResult:
    """Train `model` against `job.teacher` and a discriminator, in turn.

    Args:
        lr, critic_lr: rates of generator and discriminator (TTUR), Adam with betas 0.5 and 0.99, half a cosine to 0.
        output, features, adversarial: weights of L1 to the teacher's image (in units of the value range), of the
            discriminator's maps (squared error relative to the teacher's), and of the adversarial loss; 0: without.
        adversarial_after: share of the steps before it and the discriminator's training begin. loss: hinge or r3gan.
        penalty: weight of R1 and R2, with r3gan. augment: DiffAugment of what the discriminator is trained on.
        discriminator: "file.py:factory" of the teacher's; it takes images in the output's value range. With
            `discriminator_weights`, its weights file. "": a projected one on `encoder` (cifar or mnist; "": the
            model's own, else cifar). conditional: it takes input and output side by side, as pix2pix' does.
        real: data, teacher (its samples), or auto: the data's images where it has any.
        online: train the teacher along, against the same discriminator; needs real images.
        crop: train on random squares of this many input pixels.
    Returns:
        PassResult; `changed` is empty for a network whose output is no image. `notes` has the loss curves of both.
    Raises:
        ValueError: an option out of range, no teacher, or a discriminator that does not take the images.
        PassError: the loss was never finite.
    """
    if not critic_lr > 0:
        raise ValueError(f"critic_lr must be above 0, got {critic_lr}")
    _check(model, job, batch, loss, real, encoder, adversarial_after,
           {"output": output, "features": features, "adversarial": adversarial, "penalty": penalty})
    if not _game.is_image(model.stage.outputs[0]):
        why = "no generator: its output is no image"
        return PassResult(model, {}, dict.fromkeys(graph.layers(model.stage.module), why))
    job = dataclasses.replace(job, device=distributed.own_device(job.device))
    data_at, source = _lessons.batches(model, job, batch, crop)
    batch_at, reals = _game.with_reals(data_at, model, job, batch, real)
    if online:
        _check_online(adversarial, reals)
    rules = _game.Rules(output, features, adversarial, loss, penalty, augment, conditional,
                        0 if online else round(adversarial_after * steps), round(adversarial_after * steps))
    with training.use_threads(job.threads):
        critic = _critic(model, job, discriminator, discriminator_weights, encoder)
        game = _game.Game(model, job, critic, rules, online)
        game.check(training.place(batch_at(0), job.device))
    players = _players(game, critic, lr, critic_lr, ema, batchnorm)
    results = turns.train(
        players, batch_at, steps=steps, seed=job.seed, warmup=warmup, precision=precision, grad_clip=grad_clip,
        checkpoint=job.checkpoints / "distill_gan.safetensors" if job.checkpoints else None, progress=job.progress,
        threads=job.threads, device=job.device,
    )  # fmt: skip
    game.close()
    stopped = next((result.stopped for result in results.values() if result.stopped), "")
    result = results["student"]
    if stopped and not result.steps:
        raise PassError(f"distill_gan: {stopped}; check the value ranges of the inputs")
    notes = {
        "inputs": source, "real": reals, "adversarial_from": rules.start, "precision": result.precision,
        "discriminator": discriminator or f"projected, {_encoder(model, encoder)}",
        **_lessons.told(result), "stopped": stopped,
        "curve": {name: [list(point) for point in player.curve] for name, player in results.items()},
    }  # fmt: skip
    changed = dict.fromkeys(graph.layers(game.student), "trained")
    return PassResult(model.with_module(game.student.eval()), changed, {}, notes)


def _check(
    model: Model, job: Job, batch: int, loss: str, real: str, encoder: str, after: float, table: dict[str, float]
) -> None:
    if model.stage.module is None:
        raise ValueError(f"distill_gan needs a network, and {model.name} is an ONNX file; use quantize or cast")
    if job.teacher is None or job.teacher.stage.module is None:
        raise ValueError("distill_gan needs a teacher with a network; give the torch model")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    for name, value, allowed in (("loss", loss, ADVERSARIAL), ("real", real, REAL),
                                 ("encoder", encoder, ("", *encoders.WEIGHTS))):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if not 0 <= after < 1:
        raise ValueError(f"adversarial_after must lie in [0, 1), got {after}")
    for name, weight in table.items():
        if not weight >= 0:
            raise ValueError(f"{name} must be 0 or more, got {weight}")
    if not table["output"] + table["features"] + table["adversarial"]:
        raise ValueError("one of output, features and adversarial must be above 0")


def _check_online(adversarial: float, reals: str) -> None:
    if not adversarial:
        raise ValueError("online trains the teacher by the adversarial loss; give adversarial above 0")
    if reals == "teacher":
        raise ValueError("online needs real images, and this data has none; leave it out")


def _players(
    game: _game.Game, critic: nn.Module, lr: float, critic_lr: float, ema: float, batchnorm: str
) -> dict[str, turns.Player]:
    """Who learns, in the order of their turns: the critic, the teacher where it learns along, the student."""
    rules = game.rules
    common: dict[str, Any] = {"betas": BETAS, "batchnorm": batchnorm}
    players = {}
    if rules.adversarial:
        players["critic"] = turns.Player(critic, game.critic_loss, critic_lr, rules.critic_start, **common)
    if game.online:
        players["teacher"] = turns.Player(game.teacher, game.teacher_loss, lr, **common)
    return players | {"student": turns.Player(game.student, game.student_loss, lr, ema=ema, **common)}


def _encoder(model: Model, asked: str) -> str:
    own = str(model.options.get("features", ""))
    return asked or (own if own in encoders.WEIGHTS else "cifar")


def _critic(model: Model, job: Job, spec: str, file: str, encoder: str) -> nn.Module:
    """The teacher's discriminator, or a projected one."""
    if not spec:
        if file:
            raise ValueError("discriminator_weights are given without a discriminator; give file.py:factory as well")
        channels = int(model.stage.outputs[0].shape[1])
        return _game.seeded(job.seed, lambda: discriminators.Projected(
            encoders.create(_encoder(model, encoder)), channels)).to(job.device)  # fmt: skip
    return discriminators.Watched(_own.network("discriminator", spec, file, job.seed)).to(job.device)
