"""`edgegen evaluate`: the quality of a bundle, or of two against each other. `cli` registers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgegen import cli_options

if TYPE_CHECKING:
    from edgegen.evaluation_figures import Result
    from edgegen.types import Measurement


def evaluate(
    bundles: Annotated[list[Path], typer.Argument(help="A bundle, or two: the second is compared with the first.")],
    data: Annotated[Path | None, typer.Option(help="Images: folder, archive, .npz; real ones for a GAN.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metric, repeatable; default: the task's own.")] = None,
    n: Annotated[int, typer.Option("--n", "--samples", help="Samples; 0: all data, or 2,048 latents.", min=0)] = 0,
    features: Annotated[str, typer.Option(help="Feature extractor, such as cifar, inception or clip:FILE.")] = "",
    seed: Annotated[int, typer.Option(help="Of latents, of the choice of images, of intervals.", min=0)] = 0,
    real: Annotated[Path | None, typer.Option(help="Real images for FID and KID, where --data are inputs.")] = None,
    shard: Annotated[str, typer.Option(help="I/N: do one part of N only; run without it to merge.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and the worst images.")] = None,
    quiet: Annotated[bool, typer.Option(help="Only the result.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a finished bundle on data, or two bundles on the same inputs with the paired difference.

    Finished blocks are kept: the same command goes on where it was cut off, and torchrun shares it among processes.

    Example: edgegen evaluate out/dcgan-cpu --data digits/ --metric kid --n 5000
    """
    cli_options.need_torch("to compute features")
    from edgegen import evaluating
    from edgegen.metrics import _blocks
    from edgegen.report import terminal

    settings = evaluating.Settings(data, tuple(metric or ()), n, seed, features, shard, real)
    share = _blocks.share_of(shard)
    first = share.index == 0 or not share.together
    with terminal.progress(quiet=quiet or json_output or not first) as progress:
        found = evaluating.evaluate(bundles, settings, progress)
    if not first:
        return
    if not found.complete:
        typer.echo(f"shard {shard} is done; run the other shards, then the same command without --shard")
        return
    told = as_json(bundles, found)
    if out is not None:
        write(out, told, found)
    if json_output:
        typer.echo(json.dumps(told))
    else:
        _render(bundles, found)
        for why in dict.fromkeys(found.left_out.values()):
            typer.echo(f"without {', '.join(name for name, own in found.left_out.items() if own == why)}: {why}")
        if out is not None:
            typer.echo(f"figures and worst images: {out}")


def as_json(bundles: list[Path], found: Result) -> dict:
    """The result as JSON-ready values: NaN is null, with its reason."""
    from edgegen.report import schema

    return {
        "bundles": [
            {"bundle": str(path), "figures": [schema.figure(m) for m in figures]}
            for path, figures in zip(bundles, found.figures, strict=True)
        ],
        "paired": [schema.figure(m) for m in found.paired],
        "left_out": found.left_out,
        "worst": {"by": found.worst_of, "samples": [{"sample": i, "value": v} for i, v, _ in found.worst]},
    }


def write(out: Path, told: dict, found: Result) -> None:
    """evaluation.json, and the worst images as worst.npz (0..1) and worst.png."""
    import numpy as np

    from edgegen import files
    from edgegen.report import grid

    files.write_json(out / "evaluation.json", told)
    if not found.worst:
        return
    columns = list(found.worst[0][2])
    arrays = {name: np.stack([row[2][name] for row in found.worst]) for name in columns}
    with files.whole(out / "worst.npz") as temporary, temporary.open("wb") as handle:
        np.savez_compressed(
            handle, allow_pickle=False, index=np.array([row[0] for row in found.worst]),
            value=np.array([row[1] for row in found.worst]),
            **{f"image {k}": arrays[name] for k, name in enumerate(columns)}, columns=np.array(columns),
        )  # fmt: skip
    if arrays[columns[0]].shape[1] in (1, 3):
        rows = [[row[2][name].transpose(1, 2, 0) for name in columns] for row in found.worst]
        labels = [f"sample {index}: {found.worst_of} {value:.4g}" for index, value, _ in found.worst]
        grid.image_grid(rows, columns, row_labels=labels, out=out / "worst.png")


def _render(bundles: list[Path], found: Result) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("bundle", "figure", "value", "95% interval", "N", "features", "note"):
        table.add_column(name, overflow="fold")
    for path, figures in zip(bundles, found.figures, strict=True):
        for figure in figures:
            table.add_row(path.name, *_cells(figure))
    for figure in found.paired:
        table.add_row("second, first", *_cells(figure))
    Console().print(table)


def _cells(figure: Measurement) -> tuple[str, ...]:
    conditions = figure.conditions
    n = conditions.get("n", "")
    interval = "" if figure.interval is None else f"{figure.interval[0]:.4g} to {figure.interval[1]:.4g}"
    extractor = str(conditions.get("extractor", ""))
    mark = f"{extractor} ({conditions['extractor_sha256'][:8]})" if extractor else ""
    count = " + ".join(map(str, n)) if isinstance(n, tuple | list) else str(n)
    value = f"{figure.value:.4g} {figure.unit}".strip()
    return figure.name, value, interval, count, mark, str(conditions.get("warning", ""))
