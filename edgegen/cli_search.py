"""`edgegen search`: the front of a space on a target. `cli` registers it; heavy modules are imported inside."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgegen import cli_options
from edgegen.errors import UsageError

if TYPE_CHECKING:
    from edgegen.types import Budget

STUDY_HELP = "Database of the search: a file, or postgresql://USER:PASSWORD@HOST/NAME; also from $EDGEGEN_STUDY."


def search(
    model: Annotated[str, cli_options.named("models", "Built-in name, timm:NAME or FILE.py:FACTORY.")] = "",
    target: Annotated[str, cli_options.named("targets", "Target name, or a .toml file.")] = "cpu",
    space: Annotated[str, cli_options.named("spaces", "A name (edgegen list spaces) or a .toml file.")] = "recipe",
    trials: Annotated[int, typer.Option(help="Candidates to try, by all workers together.", min=1)] = 40,
    sampler: Annotated[str, typer.Option(help="tpe, nsga2, evolution, two-stage, shifting or random.")] = "tpe",
    weights: Annotated[Path | None, typer.Option(help=cli_options.WEIGHTS_HELP)] = None,
    data: Annotated[Path | None, typer.Option(help="Images to learn from: folder, archive of one, or .npz.")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Images to judge on; else a part of --data.")] = None,
    max_latency: Annotated[str, typer.Option(help="Latency limit (p50, batch 1), such as 5ms.")] = "",
    max_size: Annotated[str, typer.Option(help="Size limit of the artifact, such as 2MB.")] = "",
    max_quality_drop: Annotated[str, typer.Option(help=cli_options.DROP_HELP)] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the front; default out/search-MODEL-TARGET.")] = None,
    study: Annotated[str, typer.Option(help=STUDY_HELP, envvar="EDGEGEN_STUDY", show_envvar=False)] = "",
    name: Annotated[str, typer.Option(help="Name of the study in the database.")] = "",
    join: Annotated[bool, typer.Option("--join", help="Work on the study that is there, until it is done.")] = False,
    workers: Annotated[int, typer.Option(help="Worker processes on this machine, or on --ray.", min=1)] = 1,
    ray: Annotated[str, typer.Option(help="Address of a Ray cluster that works too.")] = "",
    bundles: Annotated[bool, typer.Option(help="Write every point of the front as a bundle.")] = True,
    samples: Annotated[int, typer.Option(help="Most samples in each evaluation part (0: by task).", min=0)] = 0,
    device: Annotated[str, typer.Option(help="Measure there: ssh://user@host[:port] or adb[:serial].")] = "",
    threads: Annotated[int, typer.Option(help="Threads on this host (0: the target's).", min=0)] = 0,
    train_device: Annotated[str, typer.Option(help=cli_options.TRAIN_DEVICE_HELP)] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.", min=0)] = 0,
    grace: Annotated[float, typer.Option(help="Seconds of silence after which a worker counts as dead.", min=1)] = 60.0,
    quiet: Annotated[bool, typer.Option(help="Only the result.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print front.json.")] = False,
) -> None:
    """Search a space of recipes for the front of latency, quality and size; the same command again goes on.

    Example: edgegen search --model cifar_resnet --data cifar.npz --trials 40
    """
    cli_options.need_torch("to search")
    from edgegen.report import terminal
    from edgegen.request import Request
    from edgegen.search import session
    from edgegen.search.order import Order

    if join:
        if not study:
            raise UsageError("--join needs the study to join: --study URL")
        with terminal.progress(quiet=quiet or json_output) as progress:
            done = session.join(study, name, progress, grace)
        typer.echo(f"joined: {done} candidates done here; all workers together are done")
        return
    if not model:
        raise UsageError("--model is missing: the network to search for; or --study URL --join to help a search")
    limits, unit = cli_options.budget(max_latency, max_size, max_quality_drop)
    os.environ.pop(session.STUDY, None)  # for the helpers alone, which are given their own
    stem = Path(model.split(":")[-1]).stem
    request = Request(
        model=model, target=target, weights=_absolute(weights), data=_absolute(data), eval_data=_absolute(eval_data),
        budget=limits, quality_unit=unit, samples=samples, device=device, threads=threads, seed=seed,
        train_device=train_device,
        command=shlex.join(["edgegen", *sys.argv[1:]]),
    )  # fmt: skip
    order = Order(
        request, out or Path("out") / f"search-{stem}-{Path(target).stem}", space, trials, sampler, study, name,
        workers, ray, bundles, grace,
    )  # fmt: skip
    with terminal.progress(quiet=quiet or json_output) as progress:
        path = session.search(order, progress)
    if json_output:
        typer.echo(path.read_text(encoding="utf-8"))
    else:
        _show(path)


def _show(path: Path) -> None:
    """The points of a front.json, one a line."""
    from edgegen.search import front

    found = front.read(path)
    for point in found.points:
        size = f"{point.size_bytes / 1e6:.3g} MB"
        chosen = ", ".join(f"{gene} {value}" for gene, value in point.choices.items())
        cost = f"{point.latency_ms:8.3g} ms ({point.status})  {size:>8}"
        typer.echo(f"{point.name}  {cost}  drop {point.drop:.3g}  {chosen}")
    typer.echo(f"{path}: {len(found.points)} points of {sum(found.counts.get(s, 0) for s in ('done', 'failed'))}")


def picked(
    path: Path, model: str, target: str, recipe: str, budget: Budget, min_psnr: float | None = None
) -> tuple[str, list[str], Budget]:
    """(recipe file, passes to keep, limits) of the best point of a front.json inside the limits: `--from-front`.

    Without a limit of quality, the bundle may lose as much as the front says of the point, twice over.

    Raises:
        UsageError: another model or target than the front's, or a recipe beside it. BudgetError: no point is inside.
    """
    from edgegen import recipe as recipes
    from edgegen.search import front

    if recipe:
        raise UsageError(f"--from-front gives the recipe, got --recipe {recipe} too; leave one out")
    found = front.read(path)
    for what, asked, told in (("--model", model, found.model), ("--target", target, found.target)):
        if asked != told:
            raise UsageError(f"--from-front {path}: is the front of {what} {told}, got {asked}")
    point = front.pick(found, budget, str(path))
    file = path.parent / point.recipe
    steps = recipes.load(str(file)).steps
    drop = f"{point.drop:.3g} {found.unit}"
    typer.echo(f"point {point.name}: {point.latency_ms:.3g} ms ({point.status}), drop {drop}: {file}", err=True)
    if min_psnr is None:
        budget = dataclasses.replace(budget, max_quality_drop=front.allowed(found, point, budget.max_quality_drop))
    return str(file), list(dict.fromkeys(step.name for step in steps)), budget


def _absolute(path: Path | None) -> Path | None:
    """Other workers start in other folders."""
    return path.absolute() if path is not None else None
