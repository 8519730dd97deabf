"""`edgegen compare`: two bundles, and exit code 1 when the second is worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgegen.comparing import Comparison

_STYLES = {"worse": "bold red", "better": "green", "not comparable": "yellow", "differs": "bold"}


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="The bundle that is there.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The bundle that may replace it.")],
    measure: Annotated[bool, typer.Option(help="Time both now, in turns, when they are for this machine.")] = True,
    rounds: Annotated[int, typer.Option(help="Turns of each.", min=3)] = 15,
    noise: Annotated[float, typer.Option(help="Share by which latency or size may grow.")] = 0.02,
    quality_drop: Annotated[float, typer.Option(help="How far a figure may move, in its own unit.", min=0)] = 0.0,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A table for a pull request.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what differs between two bundles; exit code 1 when B is worse than A beyond noise, else 0.

    Example: edgegen compare out/edsr-old out/edsr-new --markdown
    """
    from rich.console import Console

    from edgegen import comparing

    errs = Console(stderr=True)
    with errs.status("compare") as status:
        found = comparing.compare(
            before, after, measure=measure, rounds=rounds, noise=noise, quality_drop=quality_drop,
            progress=lambda words, _: status.update(words),
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    elif as_markdown:
        typer.echo(comparing.markdown(found))
    else:
        _render(found)
    if found.worse:
        raise SystemExit(1)


def _render(found: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from edgegen import comparing

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", found.before, found.after, "change", "verdict"):
        table.add_column(escape(name), overflow="fold")
    for line in found.lines:
        verdict = Text(line.verdict, style=_STYLES.get(line.verdict, "dim"))
        table.add_row(*map(escape, (line.name, line.before, line.after, line.change)), verdict)
    console = Console()
    console.print(table)
    for note in comparing.notes(found):
        console.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print(found.headline, markup=False, highlight=False, soft_wrap=True)
