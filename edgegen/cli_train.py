"""`edgegen train`: a network from images, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgegen import cli_options


def train(
    model: Annotated[str, cli_options.named("models", "Built-in name, timm:NAME or FILE.py:FACTORY.")],
    data: Annotated[Path, typer.Option(help="Images to learn from: folder, archive of one, or .npz.")],
    out: Annotated[Path, typer.Option(help="Weights to write, .safetensors; the record with the curve beside it.")],
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 2000,
    batch: Annotated[int, typer.Option(help="Images in a step.", min=1)] = 32,
    lr: Annotated[float, typer.Option(help="Highest learning rate (0: by kind of network).", min=0)] = 0.0,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights that are written.", min=0)] = 0.999,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd or muon.")] = "adamw",
    weights: Annotated[Path | None, typer.Option(help="Weights to begin with.")] = None,
    config: Annotated[str, typer.Option(help=cli_options.CONFIG_HELP)] = "",
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads (0: all cores).", min=0)] = 0,
    train_device: Annotated[str, typer.Option(help=cli_options.TRAIN_DEVICE_HELP)] = "auto",
    resume: Annotated[bool, typer.Option(help="Go on with the same command that was interrupted.")] = False,
    quiet: Annotated[bool, typer.Option(help="Only the result.")] = False,
) -> None:
    """Train a network on images: denoisers, classifiers, super-resolution, restoration, and generators from latents.

    Example: edgegen train --model ddpm_unet --data digits.npz --out digits.safetensors --steps 8000
    """
    cli_options.need_torch("to train")
    from edgegen import trainers
    from edgegen.records import ModelOptions
    from edgegen.report import terminal

    order = trainers.Order(
        model, data, out, steps, batch, lr, ema, seed, weights, precision, threads, resume,
        ModelOptions(config=cli_options.config(config) or {}), optimizer, train_device,
    )  # fmt: skip
    with terminal.progress(quiet=quiet) as progress:
        record = trainers.train(order, lambda text, share: progress("train", text, share))
    last = record["curve"][-1][1] if record["curve"] else float("nan")
    curve = out.with_suffix(".json")
    print(f"{out}: {record['steps']} steps in {record['seconds']:.0f} s, loss {last:.4g}; curve: {curve}")
    if record["stopped"]:
        print(record["stopped"])
