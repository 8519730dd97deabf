"""`--dry-run`: the plan of a run with what it would take."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import typer

from edgegen import cli_options

if TYPE_CHECKING:
    from edgegen.request import Request


def show(request: Request, as_json: bool) -> None:
    """Print the plan of a request: its steps, and predicted time, memory and disk."""
    cli_options.need_torch("to plan")
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from edgegen import planning
    from edgegen.report import text

    made = planning.plan(request)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(made), "seconds": made.seconds}))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("step", "what", "predicted"):
        table.add_column(name, overflow="fold")
    for step in made.steps:
        table.add_row(step.name, step.text, text.seconds(step.seconds))
    console = Console()
    console.print(table)
    lines = [
        f"predicted: about {text.seconds(made.seconds)}, memory {text.size(made.memory_bytes)}, "
        f"disk {text.size(made.disk_bytes)} while it runs; nothing was written",
        *(f"not predicted: {unknown}" for unknown in made.unknown),
        f"the bundle would be: {made.out}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
