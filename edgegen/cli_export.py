"""`edgegen export`: one network, several targets."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgegen import cli_options, errors

if TYPE_CHECKING:
    from edgegen.exporting import Exported
    from edgegen.request import Request


def export(
    target: Annotated[list[str], cli_options.named("targets", "Target name or .toml file; once for each target.")],
    bundle: Annotated[Path | None, typer.Option(help="Export the compressed network of this bundle.")] = None,
    model: Annotated[str, cli_options.named("models", "Or a model, as for compress.")] = "",
    weights: Annotated[Path | None, typer.Option(help="Weights of --model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Images; default: those of the bundle's own run.")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Images to judge on; else a part of --data.")] = None,
    calibration: Annotated[str, cli_options.named("calibration", "Calibration set: a name or a path.")] = "",
    sampler: Annotated[str, typer.Option(help=cli_options.SAMPLER_HELP)] = "",
    steps: Annotated[int, typer.Option(help="Steps of a denoiser's sampler (0: as the model says).", min=0)] = 0,
    max_size: Annotated[str, typer.Option(help="Size limit of each artifact, such as 2MB.")] = "",
    max_quality_drop: Annotated[str, typer.Option(help=cli_options.DROP_HELP)] = "",
    out: Annotated[Path, typer.Option(help="The bundles go into OUT/MODEL-TARGET.")] = Path("out"),
    resume: Annotated[bool, typer.Option(help="Go on with the same command that was interrupted.")] = False,
    resolution: Annotated[list[str] | None, typer.Option(help=cli_options.RESOLUTION_HELP)] = None,
    latency_only: Annotated[bool, typer.Option(help="No data, no quality; stamps the bundles.")] = False,
    quiet: Annotated[bool, typer.Option(help="Only the result.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Build a network for several targets: a verified bundle each, and where every number is from.

    Example: edgegen export --bundle out/edsr-cpu --target jetson --target iphone --target android
    """
    cli_options.need_torch("to export")
    cli_options.need_one_process("export")
    from edgegen import exporting
    from edgegen.report import terminal
    from edgegen.request import Request, parse_resolutions

    if (bundle is None) == (not model):
        raise errors.ModelError("export needs one of --bundle FOLDER and --model NAME")
    budget, unit = cli_options.budget("", max_size, max_quality_drop)
    base = exporting.request_of(bundle) if bundle is not None else Request(model=model, weights=weights)
    if bundle is not None and weights is not None:
        raise errors.ModelError("--weights is for --model; a bundle carries its own")
    loop = cli_options.sampler(sampler, steps)
    if bundle is not None and loop:
        raise errors.ModelError("--sampler and --steps are for --model; a bundle carries its own")
    stated: dict[str, Any] = {
        "data": data, "eval_data": eval_data, "calibration": calibration, "latency_only": latency_only,
        "resolutions": parse_resolutions(resolution or ()), "model_options": {"sampler": loop} if loop else {},
    }  # fmt: skip
    request = _with(base, {name: value for name, value in stated.items() if value}, budget, unit)
    with terminal.progress(quiet=quiet or json_output) as progress:
        rows = exporting.export(_with(request, {"resume": resume}), target, out, progress)
    if json_output:
        print(json.dumps([row.report for row in rows]))
    else:
        _render(rows)
    if not all(row.good for row in rows):
        raise SystemExit(1)


def _with(request: Request, values: dict[str, Any], budget: Any = None, unit: str = "") -> Request:
    import dataclasses

    more = {"budget": budget, "quality_unit": unit} if budget is not None else {}
    return dataclasses.replace(request, command=shlex.join(["edgegen", *sys.argv[1:]]), **more, **values)


def _render(rows: list[Exported]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from edgegen import exporting
    from edgegen.report import text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("target", "artifact", "size", "checked", "quality (measured here)", "latency there"):
        table.add_column(name, overflow="fold")
    for row in rows:
        if row.report is None:
            table.add_row(row.target, f"failed: {row.failure}", "", "", "", "")
            continue
        result = row.report["result"]
        figure = result["quality"][0] if result["quality"] else None
        quality = f"{figure['name']} {text.figure(figure)}" if figure else "not measured: --latency-only"
        checked = f"golden outputs agree: {row.checked}" if row.good else "; ".join(row.findings)
        latency = exporting.latency_text(result["latency"])
        table.add_row(row.target, row.artifact, text.size(result["size_bytes"]), checked, quality, latency)
    Console().print(table)
    for row in rows:
        if row.report is not None:
            print(f"bundle: {row.out}")
