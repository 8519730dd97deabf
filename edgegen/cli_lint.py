"""`edgegen lint-calibration`: what is wrong with a calibration set, before INT8 ranges are taken from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgegen import cli_options


def lint_calibration(
    model: Annotated[str, cli_options.named("models", cli_options.MODEL_HELP)],
    weights: Annotated[Path | None, typer.Option(help=cli_options.WEIGHTS_HELP)] = None,
    data: Annotated[Path | None, typer.Option(help="Images: folder, archive of one, or .npz.")] = None,
    calibration: Annotated[str, cli_options.named("calibration", "A set's name; without both: the model's own.")] = "",
    curve: Annotated[bool, typer.Option(help="Also: error of INT8 against the number of images.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Look a calibration set over: count, diversity, preprocessing, whites, black images; exit code 1 for findings.

    Example: edgegen lint-calibration --model edsr --calibration photos --curve
    """
    from edgegen import calibration_lint, calibration_sets, errors, loading
    from edgegen import data as datasets

    cli_options.need_torch("to load networks")
    if data is not None and calibration:
        raise errors.DataError("give --data or --calibration, not both")
    loaded = loading.load_model(model, weights=weights)
    name = calibration or str(loaded.options.get("calibration", ""))
    if data is None and not name:
        raise errors.DataError(f"{loaded.name} names no calibration set; give --data FOLDER or --calibration NAME")
    source = datasets.open_source(data) if data is not None else calibration_sets.load_split(name, "train")
    dataset = datasets.Dataset(source, loaded)
    findings = calibration_lint.lint(loaded, dataset)
    points = calibration_lint.curve(loaded, dataset) if curve else []
    if json_output:
        print(json.dumps(calibration_lint.as_json(findings, points)))
    else:
        for finding in findings:
            print(f"{finding.kind}: {finding.text}")
        for point in points:
            print(f"{point.images:>5} images: {point.sqnr_db:6.2f} dB signal to noise of the INT8 output")
        if points:
            number = calibration_lint.enough(points)
            print(f"enough: {number} images" if number else "still rising: more images would help")
        if not findings:
            print(f"{source.name}: {len(dataset)} samples, nothing found")
    if findings:
        raise SystemExit(1)
