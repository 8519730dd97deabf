"""`edgegen probe`: what each pass could gain at the most. `cli` registers it; heavy modules are imported inside."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgegen import cli_options

if TYPE_CHECKING:
    from edgegen.probing import Probed


def probe(
    model: Annotated[str, cli_options.named("models", "Built-in name, timm:NAME, FILE.py:FACTORY or FILE.pt2.")],
    target: Annotated[str, cli_options.named("targets", "Target name, or a .toml file.")] = "cpu",
    weights: Annotated[Path | None, typer.Option(help="Weights, where the network needs them to be made.")] = None,
    only: Annotated[list[str] | None, typer.Option("--pass", help="Try this pass only; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="Time there: ssh://user@host[:port] or adb[:serial].")] = "",
    threads: Annotated[int, typer.Option(help="Threads (0: the target's).", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.", min=0)] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with the same command that was interrupted.")] = False,
    quiet: Annotated[bool, typer.Option(help="Only the result.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Before any training: the most that each pass could gain on the target, timed with random weights.

    Example: edgegen probe --model cifar_resnet --target cpu
    """
    cli_options.need_torch("to probe")
    cli_options.need_one_process("probe")
    from edgegen import probing, serial
    from edgegen.report import terminal
    from edgegen.request import Request

    request = Request(
        model=model, target=target, weights=weights, device=device, threads=threads, seed=seed, resume=resume,
        command=shlex.join(["edgegen", *sys.argv[1:]]), out=Path("out") / f"probe-{Path(model.split(':')[-1]).stem}",
    )  # fmt: skip
    with terminal.progress(quiet=quiet or json_output) as progress:
        found = probing.probe(request, only or (), progress)
    if json_output:
        import json

        typer.echo(json.dumps(serial.to_json(found)))
    else:
        _render(found)


def _render(found: Probed) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from edgegen import probing
    from edgegen.report import text

    console = Console()
    latency = found.latency
    what = f"{latency.value:.3g} ms, {latency.status}"
    console.print(f"baseline: {found.baseline} of the original, {what}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("shape (no training, random weights)", "params", "MACs", "float", "INT8", "at the most"):
        table.add_column(name, justify="left" if name.startswith("shape") else "right")
    first = found.rows[0]
    for row in found.rows:
        if row.failure and not row.gain:
            table.add_row(f"{row.name} {probing.options_text(row.options)}", row.failure)
            continue
        told = f" ({row.note})" if row.note else ""
        cells = (f"{1 / one.value:.2f}x" if one is not None else "-" for one in (row.floats, row.int8))
        cost = [f"{text.count(value)} ({value / whole:.0%})" if whole else "-"
                for value, whole in ((row.params, first.params), (row.macs, first.macs))]  # fmt: skip
        table.add_row(f"{row.name} {probing.options_text(row.options)}{told}", *cost, *cells, f"{row.gain:.2f}x")
    console.print(table)
    for name, why in found.left.items():
        console.print(f"not probed: {name}: {why}", highlight=False)
    console.print("Gains against that baseline; quality is not looked at: what does not pay here pays nowhere.")
