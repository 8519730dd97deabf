"""The command line: argument parsing and rendering only. Heavy modules are imported inside the commands."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgegen import (
    cli_compare,
    cli_device,
    cli_doctor,
    cli_ending,
    cli_evaluate,
    cli_export,
    cli_lint,
    cli_options,
    cli_plan,
    cli_probe,
    cli_profile_device,
    cli_search,
    cli_train,
    errors,
    faults,
    registry,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compress image generators and vision backbones for edge devices, and prove it with measurements.",
)
LISTED = (
    "models", "passes", "targets", "runtimes", "metrics", "calibration", "recipes", "rewrites", "samplers", "spaces",
)  # fmt: skip


# The base class of what typer raises for wrong arguments; its own name is private to typer.
_WrongUsage: type[Any] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Entry point: errors are one line on stderr; exit code 2 for bad input, 1 for what failed in the work."""
    cli_ending.listen()
    try:
        raise SystemExit(app(standalone_mode=False) or 0)
    except _WrongUsage as error:
        cli_ending.say(_usage(error))
        raise SystemExit(2) from None
    except errors.EdgegenError as error:
        cli_ending.say(" ".join(str(error).split()))
        raise SystemExit(2 if isinstance(error, errors.UsageError) else 1) from None
    except OSError as error:  # a full disk, a folder that went away: not bad input, and no traceback either
        cli_ending.say(f"{error}; finished steps are kept: mend it, and run again with --resume")
        raise SystemExit(129 if cli_ending.unheard(error) else 1) from None
    except (KeyboardInterrupt, cli_ending.Ended) as error:
        line, code = cli_ending.told(error, sys.argv[1:])
        cli_ending.say(line)
        raise SystemExit(code) from None
    except Exception as error:  # noqa: BLE001 - the last resort: nothing of ours may reach the user as a traceback
        cli_ending.say(faults.told(error))
        raise SystemExit(1) from None


def _usage(error: Any) -> str:
    name = getattr(error, "option_name", "")
    if name:
        flags = [flag for parameter in error.ctx.command.params for flag in parameter.opts] if error.ctx else []
        return f"unknown option {name!r}{registry.near(name, flags)}; see {error.ctx.command_path} --help"
    where = f"; see {error.ctx.command_path} --help" if error.ctx else ""
    return " ".join(error.format_message().split()).rstrip(".") + where


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from edgegen import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def compress(
    model: Annotated[str, cli_options.named("models", cli_options.MODEL_HELP)],
    target: Annotated[str, cli_options.named("targets", "Target name, or a .toml file.")] = "cpu",
    weights: Annotated[Path | None, typer.Option(help="Weights: .safetensors, or .pth without code in it.")] = None,
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
    seed: Annotated[int, typer.Option(min=0)] = 0,
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: steps, time, memory, disk.")] = False,
    quiet: Annotated[bool, typer.Option(help="Only the result.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help=cli_options.JSON_HELP)] = False,
) -> None:
    """Take a trained network to a smaller, faster, verified bundle for a target.

    Example: edgegen compress --model edsr --target cpu --max-quality-drop 0.5
    """
    from edgegen.request import Request, parse_drop, parse_quantity, parse_resolutions
    from edgegen.types import Budget

    drop, unit = parse_drop(max_quality_drop) if max_quality_drop else (None, "")
    budget = Budget(
        parse_quantity(max_latency, "--max-latency", {"ms": 1.0, "s": 1e3, "us": 1e-3}) if max_latency else None,
        int(parse_quantity(max_size, "--max-size", cli_options.SIZES)) if max_size else None,
        drop,
    )
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
        command=shlex.join(["edgegen", *sys.argv[1:]]),
    )
    if dry_run:
        cli_plan.show(request, json_output)
        return
    _compress(request, quiet, json_output)


def _compress(request: Any, quiet: bool, json_output: bool) -> None:
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


@app.command()
def verify(bundle: Path) -> None:
    """Check a bundle: every file's hash, and the golden outputs in its runtime.

    Example: edgegen verify out/edsr-cpu
    """
    from edgegen import checking

    findings = checking.verify(bundle)
    for finding in findings:
        print(f"edgegen: {bundle}: {finding}", file=sys.stderr)
    if findings:
        raise SystemExit(1)
    print(f"{bundle}: every file matches its hash; golden outputs within tolerance")


@app.command()
def reproduce(
    bundle: Path,
    out: Annotated[Path | None, typer.Option(help="Folder of the new bundle; default BUNDLE-again.")] = None,
    quiet: bool = False,
) -> None:
    """Run a bundle's own request again and compare recipe, weights and graph with the original.

    Example: edgegen reproduce out/edsr-cpu
    """
    cli_options.need_torch("to compress")
    from edgegen import checking
    from edgegen.report import terminal

    home = bundle.resolve()  # "." has no name
    with terminal.progress(quiet=quiet) as progress:
        findings = checking.reproduce(bundle, out or home.with_name(home.name + "-again"), progress)
    for finding in findings:
        print(f"edgegen: {finding}", file=sys.stderr)
    if findings:
        raise SystemExit(1)
    print(f"{bundle}: reproduced; recipe, weights and graph are the same")


@app.command(name="list")
def list_(kind: Annotated[str, typer.Argument(help=", ".join(LISTED), autocompletion=lambda: LISTED)]) -> None:
    """List what there is of one kind.

    Example: edgegen list models
    """
    if kind not in LISTED:
        raise errors.UsageError(f"unknown kind {kind!r}{registry.near(kind, LISTED)}; there are: {', '.join(LISTED)}")
    names = registry.names(kind)
    width = max(map(len, names), default=0)
    for name in names:
        print(f"{name:<{width}}  {registry.summary(kind, name)}")


@app.command()
def cache(clean: Annotated[bool, typer.Option(help="Remove everything in it.")] = False) -> None:
    """Show where finished steps are kept and how much they take; --clean removes them.

    Example: edgegen cache
    """
    import shutil

    from edgegen import files

    folder = files.cache_folder()
    for name in sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []:
        count, size = files.tree_size(folder / name)
        print(f"{name:<12} {count:>6} files {size / 1e6:>10.1f} MB")
    count, size = files.tree_size(folder)
    print(f"{folder}: {count} files, {size / 1e6:.1f} MB")
    if clean:
        for name in files.CACHED:  # not the folder itself: $EDGEGEN_CACHE may name one that holds other things too
            shutil.rmtree(folder / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        print("removed")


@app.command()
def run(
    bundle: Path,
    source: Annotated[Path | None, typer.Argument(help="An image, or .npy network inputs; none for latents.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write the image, or .npy outputs.")] = Path("output.png"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Run a bundle on an image (or on sampled latents), with its own pre- and post-processing.

    Example: edgegen run out/edsr-cpu photo.png --out sharper.png
    """
    from edgegen import checking

    print(checking.run_sample(bundle, source, out, seed))


# Commands in files of their own; importing them puts them on `app`.
app.command()(cli_export.export)
app.command()(cli_compare.compare)
app.command()(cli_doctor.doctor)
app.command(name="lint-calibration")(cli_lint.lint_calibration)
app.command()(cli_device.profile)
app.command(name="profile-device")(cli_profile_device.profile_device)
app.command()(cli_probe.probe)
app.command()(cli_search.search)
app.command()(cli_train.train)
app.command()(cli_evaluate.evaluate)


if __name__ == "__main__":
    main()
