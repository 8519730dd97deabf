"""Commands that reach devices. `cli` registers them; heavy modules are imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgegen import errors

if TYPE_CHECKING:
    from edgegen.device_records import Record


def profile(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles; timed in turns.")],
    device: Annotated[str, typer.Option(help="local, ssh://user@host[:port] or adb[:serial].")] = "local",
    submit: Annotated[Path | None, typer.Option(help="Add the records to this results file (.json).")] = None,
    by: Annotated[str, typer.Option(help="Your name in the submitted records, if you want one there.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds of each artifact.", min=3)] = 15,
    iterations: Annotated[int, typer.Option(help="Runs in a round (0: as many as take 0.15 s).", min=0)] = 0,
    device_python: Annotated[str, typer.Option(help="Python on the device, such as /opt/venv/bin/python.")] = "",
    device_folder: Annotated[str, typer.Option(help="Where to write on the device.")] = "",
    ssh_config: Annotated[Path | None, typer.Option(help="As ssh -F.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latency against quality: .html, with .svg and .png.")] = None,
    quality: Annotated[str, typer.Option(help="Figure of the reports to draw; default: FID, KID, top-1, PSNR.")] = "",
    minutes: Annotated[float, typer.Option(help="Run one bundle this long: latency, clock, heat over time.")] = 0.0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the records instead of the table.")] = False,
) -> None:
    """Measure bundles on a device: cold load, first run, steady state, golden outputs, clocks, heat and power.

    Example: edgegen profile out/edsr-pi --device ssh://pi@raspberrypi.local --submit results.json
    Example: edgegen profile out/edsr-small out/edsr-large --plot tradeoff.html
    """
    from rich.console import Console

    from edgegen import device_records, on_device, profile_report
    from edgegen.devices._shell import Options

    errs = Console(stderr=True)
    settings = _settings(on_device, bundles, rounds, iterations, minutes)
    if plot is not None and plot.suffix != ".html":
        raise errors.UsageError(f"--plot {plot}: must end in .html; the .svg and .png are written beside it")
    if plot is not None:
        profile_report.check(bundles, quality)
    options = Options(device_python, device_folder, ssh_config)
    with errs.status(f"{device}: connect") as status:
        records = on_device.profile(
            bundles, device, settings=settings, options=options,
            progress=lambda text, fraction: status.update(f"{device}: {text} {fraction:.0%}"),
        )  # fmt: skip
    out = Console()
    if json_output:
        out.print_json(data=[device_records.to_json(record) for record in records])
    else:
        names = profile_report.names(bundles) if len(bundles) > 1 else {}
        out.print(_table(device, records, names))
        for note in _notes(records, names, course=bool(minutes)):
            out.print(note, highlight=False, soft_wrap=True, markup=False)
    good = [record for record in records if record.status == "measured"]
    if submit is not None and good:
        held = device_records.submit(good, submit, by=by)
        errs.print(f"{submit}: {held} records", highlight=False, soft_wrap=True)
    if plot is not None:
        made = profile_report.write(plot, bundles, records, quality, minutes)
        errs.print(f"drawn: {', '.join(map(str, made))}", highlight=False, soft_wrap=True)
    if bad := [record for record in records if record.status != "measured"]:
        counted = f"{len(bad)} of {len(records)} not measured: " if len(records) > 1 else "not measured: "
        raise errors.RuntimeFailed(f"{device}: {counted}{bad[0].reason}")


def _settings(on_device: Any, bundles: list[Path], rounds: int, iterations: int, minutes: float) -> Any:
    """How long to measure; a long run is one of many rounds of a second, whose clocks and heat are kept."""
    if not minutes:
        return on_device.Settings(rounds=rounds, iterations=iterations or None)
    if minutes < 0 or len(bundles) != 1:
        raise errors.UsageError(f"--minutes {minutes:g}: must be positive, with one bundle, got {len(bundles)} bundles")
    # each round runs the network for `seconds` with copies and again without
    seconds = 0.5
    count = max(3, round(minutes * 60 / (2 * seconds)))
    return on_device.Settings(rounds=count, seconds=seconds, most=4000, cold=1, limit_s=max(600.0, minutes * 60))


def _notes(records: list[Record], names: dict[str, str], course: bool) -> list[str]:
    """What to know beside the table: what was not measured, not steady, or not compared, a line each.

    course: of a long run also what latency did over its time.
    """
    from edgegen import device_records, profile_report

    notes: list[str] = []
    for record in records:
        label = _label(record, names)
        own = [f"not measured: {label}: {record.reason}"] if record.status != "measured" else []
        own += [f"not steady: {label}: {finding}" for finding in device_records.findings(record)]
        if not record.golden.checked and not own:
            own.append(f"outputs not compared: {label}: {record.golden.reason}")
        own += [profile_report.course(profile_report.moments(record))] if course else []
        notes += filter(None, own)
    return notes


def _table(device: str, records: list[Record], names: dict[str, str]) -> Any:
    from rich import box
    from rich.table import Table

    from edgegen import device_records, latency

    told: dict[str, Any] = next((r.device["facts"] for r in records), {})
    title = f"{told.get('model') or told.get('cpu_model') or device}, {told.get('os', '')}; times in ms"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("artifact", min_width=18, overflow="fold")
    for name in ("p50", "95 %", "p90", "no copies", "load", "first"):
        table.add_column(name, justify="right")
    for record in records:
        if record.status != "measured":
            continue
        figures = {m.name: m for m in device_records.measurements(record)}
        whole = figures.get("latency")
        cells = [_figure(figures.get(name)) for name in ("latency without copies", "cold load", "first run")]
        between = f"{whole.interval[0]:.3g}..{whole.interval[1]:.3g}" if whole and whole.interval else "-"
        high = f"{latency.percentile(whole, 90):.3g}" if whole and whole.samples else "-"
        table.add_row(_label(record, names), _figure(whole), between, high, *cells)
    return table


def _label(record: Record, names: dict[str, str]) -> str:
    """names: of several bundles, by the hash of their manifest; networks may be the same in all of them."""
    unit = record.artifact.options.get("compute_unit", "")
    name = names.get(record.provenance.bundle_sha256, record.network.name)
    parts = (name, record.artifact.runtime, record.artifact.precision, str(unit))
    return " ".join(filter(None, parts))


def _figure(measurement: Any) -> str:
    if measurement is None:
        return "-"
    mean = "mean " if measurement.conditions.get("statistic") == "mean" else ""
    return f"{mean}{measurement.value:.3g}"
