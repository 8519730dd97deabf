"""The end of a run: pictures, report and bundle, put into place together."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import (
    bundle,
    bundle_samples,
    calibration_sets,
    layer_rows,
    measuring,
    model_card,
    recipe,
    registry,
    resolutions,
    samplers,
    serial,
    summary,
)
from edgegen.candidates import Candidate
from edgegen.errors import RuntimeFailed
from edgegen.final import Final, golden_between, golden_of
from edgegen.images import unit_range
from edgegen.report import grid, html, schema
from edgegen.run import Run
from edgegen.types import Artifact, Bundle, Model

SHOWN, WORST = 3, 2
AMPLIFIED = 8  # one grey step of 8 bits is barely seen; eight are


def deliver(run: Run, model: Model, final: Final, content: dict[str, Any]) -> Bundle:
    """Write the bundle of the chosen build to the run's output folder, whole or not at all.

    content: report.json as far as `summary.report` and the run know it.
    """
    artifact = final.chosen.artifact
    if artifact is None:
        raise RuntimeFailed(f"{final.chosen.label} was not built")
    run.progress("bundle", str(run.out), 0.0)
    sizes = resolutions.further(run, model, final)
    folder = run.folder / "report"
    checked = _reported(run, final, content, sizes, folder)
    card = model_card.card(checked, artifact.runtime)
    report = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    feeds, outputs, tolerance = golden_of(run, final)
    graphs = resolutions.graphs(sizes, bundle_samples.runs_graph(artifact))
    told = json.dumps(serial.to_json(run.request), indent=1, sort_keys=True) + "\n"
    result = bundle.write(
        run.out,
        bundle.Contents(
            model=model,
            original=run.model,
            artifacts=(artifact, *(size.artifact for size in sizes if size.artifact is not None)),
            graph=final.chosen.graph,
            target=run.target.name,
            recipe=recipe.to_toml(run.recipe),
            golden=(bundle.Golden(feeds, outputs, tolerance), *_golden_between(run, final), *resolutions.golden(sizes)),
            report=report,
            extra={"request.json": told, "MODEL_CARD.md": card, **_project(model, artifact), **graphs},
            licences=_attributions(run),
            stamps=(*summary.stamps(run), *resolutions.stamps(sizes)),
            versions=dict(artifact.versions),
        ),
    )
    run.progress("bundle", str(run.out), 1.0)
    return result


def _reported(
    run: Run, final: Final, content: dict[str, Any], sizes: Sequence[resolutions.Resolution], folder: Path
) -> dict[str, Any]:
    """report.json, report.html and the pictures in `folder`; returns what report.json holds."""
    content["resolutions"] = resolutions.rows(run, final, sizes)
    content["stamps"] = [*content["stamps"], *resolutions.stamps(sizes)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    content["images"] = pictures(run, final, folder)
    content |= layers(run, final, content["steps"])
    content["reproduce"] = f"edgegen reproduce {run.out}"
    return html.write_report(folder, schema.normalise(content))


def _golden_between(run: Run, final: Final) -> list[bundle.Golden]:
    """Golden outputs of the partial artifact, where blocks are cached."""
    found = golden_between(run, final)
    return [] if found is None else [bundle.Golden(*found, partial=True)]


def layers(run: Run, final: Final, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layers of the chosen build, timed where it runs here and its runtime tells; the target's own figures.

    Figures of single layers move from the steps to the layers.
    """
    artifact, graph = final.chosen.artifact, final.chosen.graph
    if artifact is None:
        raise RuntimeFailed(f"{final.chosen.label} was not built")
    times: list[dict[str, Any]] = []
    reason = "the target is not this machine"
    if run.bench.here and not run.bench.device:
        try:
            with measuring.Worker(artifact, run.bench.limits) as worker:
                times, reason = worker.layer_times(run.bench.feeds)
        except RuntimeFailed as error:
            reason = str(error)
    told = [{key: step["figures"].pop(key, None) for key in layer_rows.FIGURES} for step in steps]
    kept = ("kept", "forced", "predicted", "needs recovery")
    noted = [notes for notes, step in zip(told, steps, strict=True) if step["status"] in kept]
    rows = layer_rows.rows(graph, final.chosen.inspection, times, noted)
    return {"layers": rows, "layers_reason": "" if times else reason, "roof": layer_rows.roof(run.target),
            "dla": layer_rows.dla(artifact, run.target)}  # fmt: skip


def _project(model: Model, artifact: Artifact) -> dict[str, str]:
    """The app for the runtime's devices, where the runtime has one: file in the bundle -> text."""
    module = registry.module("runtimes", artifact.runtime)
    if not hasattr(module, "project") or samplers.of(model.options) is not None:  # the apps run a network once
        return {}
    span = model.stage.outputs[0].value_range
    made = module.project(artifact, model.name, model.preprocessing, model.task, span)
    return {f"{module.PROJECT}/{name}": text for name, text in made.items()}


def _attributions(run: Run) -> dict[str, str | bytes | Path]:
    """Licences of the calibration sets that were used, one line a work."""
    named = {run.request.calibration, str(run.model.options.get("calibration", ""))}
    used = sorted(named & set(registry.names("calibration"))) if run.request.data is None else []
    return {f"calibration-{name}.txt": "\n".join(calibration_sets.attributions(name)) + "\n" for name in used}


def pictures(run: Run, final: Final, folder: Path) -> list[dict[str, str]]:
    """Grids of reference, teacher and student on the same held-out inputs: the first ones, and the worst ones."""
    dataset = run.data.test
    output = run.model.stage.outputs[0]
    if dataset is None or run.model.task == "classification" or len(output.shape) != 4 or output.shape[1] not in (1, 3):
        return []
    spread = np.linspace(0, len(dataset) - 1, min(SHOWN, len(dataset))).astype(int)
    figure = _paired(final.chosen)
    order = np.argsort(np.nan_to_num(figure, nan=-np.inf))
    worst = [int(i) for i in order[:WORST]] if len(figure) == len(dataset) else []
    shown = []
    for name, indices in (("examples", [int(i) for i in spread]), ("worst", worst)):
        if not indices:
            continue
        columns, rows = _rows(run, final, indices)
        labels = [f"sample {i}" + (f": {figure[i]:.1f} dB to the teacher" if len(figure) else "") for i in indices]
        grid.image_grid(rows, columns, row_labels=labels, out=folder / "images" / f"{name}.png")
        said = "the same held-out inputs" if name == "examples" else "the inputs on which the two differ most"
        shown.append({"file": f"images/{name}.png", "caption": f"{', '.join(columns)} on {said}"})
    return shown


def _paired(candidate: Candidate) -> np.ndarray:
    found = [f for f in candidate.figures if f.name == "PSNR to the teacher"]
    return np.array(found[0].samples) if found else np.array([])


def _rows(run: Run, final: Final, indices: list[int]) -> tuple[list[str], list[list[np.ndarray]]]:
    dataset, artifact, graph = run.data.test, final.chosen.artifact, final.chosen.graph
    if artifact is None:
        raise RuntimeFailed(f"{final.chosen.label} was not built")
    samples = [dataset[i] for i in indices]
    teacher = np.load(run.folder / "outputs" / "teacher-test.npy", mmap_mode="r", allow_pickle=False)
    with contextlib.ExitStack() as stack:
        execute = measuring.runs(artifact, stack, run.bench.limits)
        given = np.stack([s.input for s in samples])
        if graph.sampler is not None:
            student = samplers.generate(graph.sampler, execute, given)
        else:
            student = execute({graph.inputs[0].name: given})[graph.outputs[0].name]
    columns: dict[str, list[np.ndarray]] = {}
    given = samples[0].input
    span = run.model.stage.inputs[0].value_range
    if span is not None and given.ndim == 3 and given.shape[0] in (1, 3):
        columns["input"] = [_picture(s.input, _normalised_range(run, span)) for s in samples]
    if samples[0].reference is not None:
        columns["reference"] = [_picture(s.reference, _output_range(run)) for s in samples]
    columns["teacher"] = [_picture(teacher[i], _output_range(run)) for i in indices]
    columns["student"] = [_picture(image, _output_range(run)) for image in student]
    gaps = [np.abs(a - b).mean(axis=2) for a, b in zip(columns["teacher"], columns["student"], strict=True)]
    columns[f"difference x{AMPLIFIED}"] = [np.clip(gap * AMPLIFIED, 0.0, 1.0) for gap in gaps]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _output_range(run: Run) -> tuple[float, float]:
    return run.model.stage.outputs[0].value_range or (0.0, 1.0)


def _normalised_range(run: Run, span: tuple[float, float]) -> tuple[float, float]:
    how = run.model.preprocessing
    low, high = span
    if how.mean:
        low, high = (low - how.mean[0]) / how.std[0], (high - how.mean[0]) / how.std[0]
    return low, high


def _picture(image: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """(C, H, W) in `span` to (H, W, C) in 0..1."""
    return unit_range(np.asarray(image, np.float32), span).transpose(1, 2, 0)
