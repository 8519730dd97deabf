"""Measure bundles on a device: push what is needed, run the runner there, pull the samples, make records of them.

The network is the bundle's built artifact, its outputs are compared with the bundle's golden ones on the device, and
all artifacts of one call are timed in turns. What is finished is kept on the device until all of it is.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen import device_records, errors, files
from edgegen.device_items import Item, in_bundles, unbundled
from edgegen.device_records import Cold, Golden, Record, Round, Warm
from edgegen.devices import _spec, _tools
from edgegen.devices._shell import Device, Options
from edgegen.types import Artifact, Measurement

RUNNER = Path(_spec.__file__).with_name("_runner.py")

Progress = Callable[[str, float], Any]


@dataclass(frozen=True)
class Settings:
    """How long to measure. iterations: runs a round (None: as many as take `seconds`, `most` at most). cold: loads in
    fresh processes. limit_s: longest time of one request, such as a load; runs that take longer are not measured."""

    rounds: int = 15
    iterations: int | None = None
    seconds: float = 0.15
    warm_seconds: float = 0.3
    cold: int = 3
    seed: int = 0
    limit_s: float = 600.0
    most: int = 400


DEFAULTS = Settings()


def profile(
    bundles: Sequence[Path],
    device: str = "local",
    *,
    settings: Settings = DEFAULTS,
    options: Options = _spec.DEFAULTS,
    progress: Progress = lambda text, fraction: None,
) -> list[Record]:
    """Records of every artifact of the bundles on a device, one each (Core ML: one for each compute unit).

    What could not be measured is a record with status "not measured" and the reason.

    Raises:
        UsageError: not a device, not a bundle, a bundle that was changed. TargetUnavailable: the device cannot be
        reached, or the connection was cut: what is finished is kept there, and the same call goes on from it.
        RuntimeFailed: the device's disk is full, or the runner cannot run there.
    """
    return _measured(list(in_bundles(bundles)), device, settings, options, progress)


def time_artifacts(
    artifacts: Sequence[Artifact],
    target: str,
    device: str,
    *,
    settings: Settings = DEFAULTS,
    options: Options = _spec.DEFAULTS,
    progress: Progress = lambda text, fraction: None,
) -> list[Measurement]:
    """Latency of artifacts that are in no bundle yet, on a device, in turns; what fails is "not measured".

    Raises:
        As for `profile`.
    """
    items = [unbundled(artifact, target) for artifact in artifacts]
    records = _measured(items, device, settings, options, progress)
    return [device_records.measurements(record)[0] for record in records]


def _measured(items: list[Item], device: str, settings: Settings, options: Options, progress: Progress) -> list[Record]:
    """A record an item: all together by the runner, or one by one by the vendor's tool where there is no Python."""
    with _spec.open_device(device, options) as connected:
        kind = _spec.parse(device).kind
        common = {"settings": {**dataclasses.asdict(settings), "run": uuid.uuid4().hex[:12]}}
        if python := connected.python():
            return _by_runner(connected, python, kind, items, common, progress)
        return [_by_tool(connected, kind, item, common) for item in items]


def _by_runner(
    device: Device, python: str, kind: str, items: list[Item], common: dict[str, Any], progress: Progress
) -> list[Record]:
    """Push, run, pull; the run's folder on the device goes when all is finished."""
    settings = {key: value for key, value in common["settings"].items() if key != "run"}
    job = {"settings": settings, "items": [item.told() for item in items]}
    runner_hash = files.sha256(RUNNER)
    run, runner = f"runs/{files.key(job, runner_hash)}", f"runner/{runner_hash[:16]}.py"
    with tempfile.TemporaryDirectory(prefix="edgegen-") as folder:
        told = Path(folder) / "job.json"
        told.write_text(json.dumps(job), encoding="utf-8")
        wanted = {runner: RUNNER, f"{run}/job.json": told}
        for item in items:
            wanted |= {f"{item.folder}/{name}": source for name, source in item.sources.items()}
        progress("push", 0.0)
        device.push(wanted)
    _run(device, [python, runner, "run", run], len(items), settings, progress)
    lines = [json.loads(line) for line in device.pull(f"{run}/log.jsonl").decode().splitlines() if _whole(line)]
    device.remove(run)
    about = {"kind": kind, "facts": [line["facts"] for line in lines if line["kind"] == "facts"][-1]}
    return [
        _record(item, about, [line for line in lines if line.get("item") in (number, "before", "after")], common)
        for number, item in enumerate(items)
    ]


def _run(device: Device, argv: list[str], count: int, settings: dict[str, Any], progress: Progress) -> None:
    """Run the runner and follow it.

    Raises:
        TargetUnavailable: the connection was cut. RuntimeFailed: the runner gave up; says why.
    """
    said: list[dict[str, Any]] = []
    total = count * (settings["cold"] + settings["rounds"])

    def follow(line: str) -> None:
        if _whole(line):
            said.append(json.loads(line))
            finished = sum(1 for one in said if one["kind"] in ("cold", "round"))
            progress("measure", min(1.0, finished / max(1, total)))

    try:
        done = device.run(argv, follow, seconds=60 + count * settings["limit_s"] * 4)
    except errors.TargetUnavailable as error:
        finished = sum(1 for one in said if one["kind"] in ("cold", "round"))
        raise errors.TargetUnavailable(
            f"{error} in mid-run; {finished} of {total} parts were finished just now and are kept there: the same "
            "command goes on from there"
        ) from error
    if refused := [one["reason"] for one in said if one["kind"] == "refused"]:
        device.refuse_full(refused[0], "go on measuring; what is finished is kept")
        raise errors.RuntimeFailed(f"{device.name}: {refused[0]}")
    if done.code != 0 or not said or said[-1]["kind"] != "done":
        words = ([line.strip() for line in done.err.splitlines() if line.strip()] or ["it said nothing"])[-1]
        raise errors.RuntimeFailed(f"{device.name}: the runner ended with exit code {done.code}: {words[:300]}")


def _whole(line: str) -> bool:
    """Whether a line is a JSON object; what a library printed, or a line that was cut off, is not."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _record(item: Item, about: dict[str, Any], lines: list[dict[str, Any]], common: dict[str, Any]) -> Record:
    """A record from the log lines of one item; `common` is of all records of the call."""

    def of(kind: str, *names: str) -> list[dict[str, Any]]:
        return [{name: line[name] for name in names} for line in lines if line["kind"] == kind]

    states = {line["item"]: line["state"] for line in lines if line["kind"] == "state"}
    golden = of("golden", "told")
    checked = Golden(**golden[-1]["told"]) if golden else Golden(checked=False, reason="not run")
    opened = of("cold", "version", "got")
    rounds = of("round", "session", "ms", "bare_ms", "state")
    reason = ""
    if len(rounds) < common["settings"]["rounds"]:
        reason = ["the runner did not measure it", *(line["reason"] for line in of("failed", "reason"))][-1]
    elif checked.checked and not checked.ok:
        reason = f"its outputs there differ by {checked.worst} from the golden ones, allowed {checked.tolerance:.4g}"
    return Record(
        **item.known(common, "runner", files.sha256(RUNNER)),
        device=about,
        status="not measured" if reason else "measured",
        reason=reason,
        runtime_version=opened[-1]["version"] if opened else "",
        obtained=opened[-1]["got"] if opened else {},
        before=states.get("before", {}),
        after=states.get("after", {}),
        golden=checked,
        cold=[Cold(**one) for one in of("cold", "import_ms", "load_ms", "first_ms", "page_cache")],
        warm=[Warm(**one) for one in of("warm", "session", "ms", "runs", "settled")],
        rounds=[Round(**one) for one in rounds],
        peak_bytes=[0, *(line["peak_bytes"] for line in of("memory", "peak_bytes"))][-1],
    )


def _by_tool(device: Device, kind: str, item: Item, common: dict[str, Any]) -> Record:
    """One artifact by the vendor's own program, on a device that has no Python."""
    runtime, told = item.artifact.runtime, {**item.told(), "folder": item.folder}
    tool = _tools.TOOLS.get(runtime, "")
    path = device.shell(_tools.find(tool)).text.strip().split("\n")[0] if tool else ""
    before = device.probe()
    base = {**item.known(common, tool or "none"), "device": {"kind": kind, "facts": before}}
    if not path:
        cure = "install Python 3.8 or newer there (or name one: --device-python)" + (f", or {tool}" if tool else "")
        reason = f"no Python 3.8 or newer there{f', and no {tool}' if tool else ''}: {cure}"
        return Record(**base, status="not measured", reason=reason)
    device.push({f"{item.folder}/{name}": source for name, source in item.sources.items()})
    seconds = max(1.0, common["settings"]["rounds"] * common["settings"]["seconds"])
    place = shlex.quote(f"{device.folder}/{item.folder}")
    done = device.shell(f"cd {place} && {_tools.command(tool, path, told, seconds)}", seconds=120 + 20 * seconds)
    times = device.pull(f"{item.folder}/{_tools.TIMES}").decode() if tool == "trtexec" else ""
    after = device.probe()
    try:
        found = _tools.parse(tool, done.text, told, times)
    except errors.RuntimeFailed as error:
        return Record(**base, status="not measured", reason=str(error))
    samples = {name: found.pop(name, []) for name in ("samples", "bare_samples")}
    rounds = [Round(session=1, ms=samples["samples"], bare_ms=samples["bare_samples"])] if samples["samples"] else []
    unread = "; it does not read the weights" if tool == "benchncnn" else ""
    return Record(
        **base,
        status="measured",
        runtime_version=str(found.pop("version", "")),
        before=_state(before),
        after=_state(after),
        golden=Golden(checked=False, reason=f"{tool} compares no outputs{unread}"),
        summary=found,
        rounds=rounds,
    )


def _state(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("mhz", "celsius") if key in facts}
