"""One network, several targets: a bundle each, and a table that says for every number where it is from."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen import bundle, checking, faults, pipeline, registry, serial, targets
from edgegen.errors import BundleError, EdgegenError, TargetError, UsageError
from edgegen.request import Request, check_out

if TYPE_CHECKING:
    from edgegen.judgement import Progress

# What an export takes over from the run that made the bundle: its data and how they were used.
_DATA = ("data", "eval_data", "calibration", "calibration_images", "samples", "features", "latency_only", "seed")


@dataclass(frozen=True)
class Exported:
    """What became of one target. report: the bundle's report.json; findings: what `verify` says; failure: why nothing.

    checked: where the golden outputs were compared: "ran in ..." or the twin's name.
    """

    target: str
    out: Path
    report: dict[str, Any] | None = None
    artifact: str = ""
    checked: str = ""
    findings: tuple[str, ...] = ()
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether there is a bundle, and it verifies."""
        return not self.failure and not self.findings


def request_of(path: Path) -> Request:
    """The request that made a bundle, as far as it concerns data; the model is the bundle itself.

    Raises:
        BundleError: not a bundle, or it does not hold its request.
    """
    opened = bundle.read(path)
    file = opened.path / "request.json"
    if not file.is_file():
        raise BundleError(f"{path}: holds no request.json; give --data, or --model in place of --bundle")
    told = serial.from_json(Request, json.loads(file.read_text(encoding="utf-8")))
    return Request(model=str(path), **{name: getattr(told, name) for name in _DATA})


def export(request: Request, names: Sequence[str], out: Path, progress: Progress) -> list[Exported]:
    """A bundle in `out`/<model>-<target> for every target; a target that fails is a row with its reason.

    Args:
        request: its model, data and budget count; `target`, `out` and `recipe` are set here. The passes that change
            the network are left out: what is exported is the network as it is, in the precisions that pay.
    Raises:
        UsageError: an unknown target or option, or an output folder that is taken; before any work.
    """
    plans = []
    for name in dict.fromkeys(names):
        target = targets.load(name)
        folder = out / f"{_stem(request.model)}-{target.name}"
        check_out(folder, request.resume)
        command = request.command or shlex.join(["edgegen", "export", "--model", request.model, "--target", name])
        plan = dataclasses.replace(request, target=name, out=folder, recipe="post-training", command=command)
        plans.append((target.name, plan, folder))
    if not plans:
        raise TargetError(f"export needs --target; there are: {', '.join(registry.names('targets'))}")
    rows: list[Exported] = []
    for number, (name, plan, folder) in enumerate(plans):
        progress("target", name, number / len(plans))
        try:
            rows.append(_one(name, plan, folder, progress))
        except EdgegenError as error:
            if isinstance(error, UsageError) and not number:
                raise  # the model or the data: it would be the same for every target
            rows.append(Exported(name, folder, failure=str(error)))
        except Exception as error:  # noqa: BLE001 - the other targets must not pay for a fault in one of them
            rows.append(Exported(name, folder, failure=faults.told(error)))
    return rows


def _one(name: str, request: Request, out: Path, progress: Progress) -> Exported:
    made = pipeline.compress(request, progress)
    report = json.loads((made.path / "report.json").read_text(encoding="utf-8"))
    artifact = bundle.artifacts(made)[0]
    module = registry.module("runtimes", artifact.runtime)
    ran = module.twin(artifact).runtime if hasattr(module, "twin") else artifact.runtime
    # A runtime that is here may still have files for another device's delegate.
    elsewhere = ran != artifact.runtime and (module.missing() or "delegate" in artifact.options)
    checked = f"its twin in {ran}" if elsewhere else f"ran here in {artifact.runtime}"
    findings = tuple(str(finding) for finding in checking.verify(made.path))
    return Exported(name, out, report, artifact.label, checked, findings)


def _stem(model: str) -> str:
    """`edsr` of `edsr`, `timm:edsr`, `nets/edsr.py:create`, or of the bundle out/edsr-cpu."""
    path = Path(model)
    if path.is_dir():
        return str(bundle.read(path).manifest["model"]["name"])
    return Path(model.split(":")[-1]).stem


def latency_text(figure: dict[str, Any]) -> str:
    """A latency with where it is from: measured on the named device, estimated, or not measured and why."""
    device = str(figure["conditions"].get("device", ""))
    if figure["status"] == "measured":
        return f"{figure['value']:.3g} ms, measured {f'on {device}' if device else 'here'}"
    if figure["status"] == "estimated":
        low, high = figure["interval"]
        how = figure["conditions"].get("method", "estimate")
        return f"not measured: no device; estimated {low:.3g} to {high:.3g} ms ({how})"
    return f"not measured: {figure['reason']}"
