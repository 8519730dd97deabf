"""`edgegen doctor`: what works, what is missing, and the line that mends it."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(
    device: Annotated[str, typer.Option(help="Look at a device too: ssh://user@host[:port] or adb[:serial].")] = "",
    json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what works on this machine (and on a device), what is missing, and the exact line that mends it.

    Example: edgegen doctor --device ssh://pi@raspberrypi
    """
    import dataclasses

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgegen import doctor as checks

    findings = checks.examine()
    if device:
        from edgegen.devices import _spec

        with _spec.open_device(device) as opened:
            findings += [dataclasses.replace(f, what=f"{device}: {f.what}") for f in checks.of_device(opened.probe())]
    if json_output:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    else:
        styles = {"works": "green", "note": "yellow", "missing": "dim", "broken": "red"}
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            table.add_row(finding.what, Text(finding.state, style=styles[finding.state]), Text(finding.text))
            if finding.cure:
                table.add_row("", "", Text(f"-> {finding.cure}", style="bold"))
        Console().print(table)
    if any(finding.state == "broken" for finding in findings):
        raise SystemExit(1)
