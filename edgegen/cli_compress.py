"""`edgegen compress`: its options as one request. `cli` registers it; heavy modules are imported inside."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgegen import cli_options, cli_plan, cli_search

if TYPE_CHECKING:
    from edgegen.request import Request


def compress(
    model: Annotated[str, cli_options.named("models", cli_options.MODEL_HELP)],
    target: Annotated[str, cli_options.named("targets", "Target name, or a .toml file.")] = "cpu",
    weights: Annotated[Path | None, typer.Option(help=cli_options.WEIGHTS_HELP)] = None,
    data: Annotated[Path | None, typer.Option(help="Images to learn from: folder, archive of one, or .npz.")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Images to judge on; else a part of --data.")] = None,
    calibration: Annotated[str, cli_options.named("calibration", "Calibration set: a name or a path.")] = "",
    calibration_images: Annotated[int, typer.Option(help="How many images to calibrate on.", min=1)] = 100,
    recipe: Annotated[str, cli_options.named("recipes", "Recipe: a preset's name or a .toml file.")] = "",
    from_front: Annotated[Path | None, typer.Option(help="Recipe: the best point of a search's front.json.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Keep this pass even when it does not pay.")] = None,
    max_latency: Annotated[str, typer.Option(help="Latency limit (p50, batch 1), such as 5ms.")] = "",
    max_size: Annotated[str, typer.Option(help="Size limit of the artifact, such as 2MB.")] = "",
    max_quality_drop: Annotated[str, typer.Option(help=cli_options.DROP_HELP)] = "",
    min_psnr: Annotated[float | None, typer.Option(help="image-to-image: least PSNR to the teacher, in dB.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the bundle; default out/MODEL-TARGET.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the same command that was interrupted.")] = False,
    resolution: Annotated[list[str] | None, typer.Option(help=cli_options.RESOLUTION_HELP)] = None,
    latency_only: Annotated[bool, typer.Option(help="Timing without data or quality; stamps the bundle.")] = False,
    samples: Annotated[int, typer.Option(help="Most samples in each evaluation part (0: by task).", min=0)] = 0,
    features: Annotated[str, typer.Option(help="Feature extractor of perceptual distance and KID.")] = "",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads on this host (0: all cores).", min=0)] = 0,
    max_memory: Annotated[str, typer.Option(help="Memory limit of each worker, such as 4GB.")] = "",
    task: Annotated[str, typer.Option(help="Task, where the model does not state it.")] = "",
    input_shape: Annotated[str, typer.Option(help="Such as 1,3,224,224.")] = "",
    value_range: Annotated[str, typer.Option(help="What pixel 0 and 255 become, such as 0,1.")] = "",
    output_range: Annotated[str, typer.Option(help="Range of output images, such as 0,1.")] = "",
    mean: Annotated[str, typer.Option(help="Subtracted per channel, in units of the value range.")] = "",
    std: Annotated[str, typer.Option(help="Divided by per channel.")] = "",
    resize: Annotated[int | None, typer.Option(help="Shorter side in pixels before the centre crop.")] = None,
    scale: Annotated[int | None, typer.Option(help="Enlargement of a super-resolution network.")] = None,
    config: Annotated[str, typer.Option(help=cli_options.CONFIG_HELP)] = "",
    sampler: Annotated[str, typer.Option(help=cli_options.SAMPLER_HELP)] = "",
    steps: Annotated[int, typer.Option(help="Steps of a denoiser's sampler (0: as the model says).", min=0)] = 0,
    device: Annotated[str, typer.Option(help="Measure there: ssh://user@host[:port], adb[:serial] or local.")] = "",
    thorough: Annotated[bool, typer.Option("--thorough", help=cli_options.THOROUGH_HELP)] = False,
    train_device: Annotated[str, typer.Option(help=cli_options.TRAIN_DEVICE_HELP)] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: steps, time, memory, disk.")] = False,
    quiet: Annotated[bool, typer.Option(help="Only the result.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help=cli_options.JSON_HELP)] = False,
) -> None:
    """Take a trained network to a smaller, faster, verified bundle for a target.

    Example: edgegen compress --model edsr --target cpu --max-quality-drop 0.5
    """
    from edgegen.request import Request, parse_quantity, parse_resolutions

    budget, unit = cli_options.budget(max_latency, max_size, max_quality_drop)
    if from_front is not None:
        recipe, found, budget = cli_search.picked(from_front, model, target, recipe, budget, min_psnr)
        keep = [*(keep or ()), *found]
    request = Request(
        model=model,
        target=target,
        weights=weights,
        data=data,
        eval_data=eval_data,
        calibration=calibration,
        calibration_images=calibration_images,
        recipe=recipe,
        kept=tuple(keep or ()),
        budget=budget,
        quality_unit=unit,
        min_psnr=min_psnr,
        out=out,
        resume=resume,
        latency_only=latency_only,
        seed=seed,
        threads=threads,
        samples=samples,
        features=features,
        max_memory_bytes=int(parse_quantity(max_memory, "--max-memory", cli_options.SIZES)) if max_memory else 0,
        model_options=cli_options.model_options(
            task=task,
            input_shape=cli_options.integers(input_shape, "--input-shape"),
            value_range=cli_options.floats(value_range, "--value-range", 2),
            output_range=cli_options.floats(output_range, "--output-range", 2),
            mean=cli_options.floats(mean, "--mean"),
            std=cli_options.floats(std, "--std"),
            resize=resize,
            scale=scale,
            config=cli_options.config(config),
            sampler=cli_options.sampler(sampler, steps),
        ),
        device=device,
        resolutions=parse_resolutions(resolution or ()),
        thorough=thorough,
        train_device=train_device,
        command=shlex.join(["edgegen", *sys.argv[1:]]),
    )
    if dry_run:
        cli_plan.show(request, json_output)
        return
    _compress(request, quiet, json_output)


def _compress(request: Request, quiet: bool, json_output: bool) -> None:
    cli_options.need_torch("to compress")
    cli_options.need_one_process("compress")
    from edgegen import pipeline
    from edgegen.report import events, terminal

    shown = events.progress() if json_output and not quiet else terminal.progress(quiet=quiet)
    with shown as progress:
        bundle = pipeline.compress(request, progress)
    report = json.loads((bundle.path / "report.json").read_text(encoding="utf-8"))
    if json_output:
        print(json.dumps(report))
        return
    terminal.render(report)
    print(f"bundle: {bundle.path}")
