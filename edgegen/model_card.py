"""The model card of a bundle, as the Hugging Face Hub reads it: a YAML header and the figures of report.json."""

from __future__ import annotations

import json
from typing import Any

from edgegen.report import text

# Names of the Hub's tasks; what it has no name for is told as the nearest.
_TASKS = {
    "classification": "image-classification",
    "super-resolution": "image-to-image",
    "restoration": "image-to-image",
    "image-to-image": "image-to-image",
    "unconditional": "unconditional-image-generation",
}
_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "cc0-1.0", "cc-by-4.0", "gpl-3.0", "unknown")
_LIBRARIES = {"onnxruntime": "onnx", "openvino": "openvino", "coreml": "coreml", "litert": "tflite"}


def card(report: dict[str, Any], runtime: str) -> str:
    """MODEL_CARD.md from a checked report (`schema.normalise`). Strings are JSON, which YAML reads as they are."""
    result, base = report["result"], report["baseline"]
    licence = str(report["provenance"].get("licence") or "unknown")
    task = _TASKS.get(report["task"], "image-to-image")
    head = [
        "---",
        f"license: {json.dumps(_licence(licence))}",
        *([f"license_name: {json.dumps(licence)}"] if _licence(licence) == "other" else []),
        f"pipeline_tag: {task}",
        f"library_name: {json.dumps(_LIBRARIES.get(runtime, runtime))}",
        f"tags: {json.dumps(['edgegen', 'compressed', report['target'], result['precision']['plan'].split(' ')[0]])}",
        *_index(report, task),
        "---",
    ]
    stamps = "".join(f"> **{stamp}**\n\n" for stamp in report["stamps"])
    rows = [("latency p50", _with_interval(base["latency"]), _with_interval(result["latency"]))]
    rows += [(name, form(base[key]), form(result[key])) for key, name, form in (
        ("macs", "MACs", text.count), ("params", "parameters", text.count), ("size_bytes", "file size", text.size),
        ("peak_memory_bytes", "peak memory", text.size))]  # fmt: skip
    before = {figure["name"]: figure for figure in base["quality"]}
    rows += [(f["name"], _with_interval(before.get(f["name"])), _with_interval(f)) for f in result["quality"]]
    table = "\n".join(f"| {_cell(name)} | {_cell(old)} | {_cell(new)} |" for name, old, new in rows)
    there = ("kept", "forced", "predicted", "needs recovery")
    kept = [step["name"] for step in report["steps"] if step["status"] in there]
    return (
        "\n".join(head) + f"\n\n# {report['model']} for {report['target']}\n\n{stamps}{report['headline']}\n\n"
        f"| | {_cell(base['label'])} | {_cell(result['label'])} |\n|---|---|---|\n{table}\n\n"
        f"Latency on {_device(report)}: {result['latency']['status']}{_reason(result['latency'])}. The baseline is the"
        " best unquantized build of the original there. In brackets: 95% intervals.\n\n"
        f"Made by edgegen on {report['date'][:10]} from {report['provenance'].get('source') or 'unknown weights'}"
        f"{_paper(report)}. Passes kept: {', '.join(kept) or 'none'}. Seed {report['seed']}.\n\n"
        f"{_judged(report)} Every sample of every figure is in report.json.\n"
    )


def _device(report: dict[str, Any]) -> str:
    """The target, and where it was measured the processor, threads and batch."""
    told = report["result"]["latency"]["conditions"]
    if report["result"]["latency"]["status"] != "measured":
        return str(report["target"])
    known = [str(told.get("cpu_model") or report["machine"].get("cpu_model") or "")]
    known += [f"{told['threads']} thread{'s' * (told['threads'] != 1)}"] if told.get("threads") else []
    facts = ", ".join(filter(None, [*known, f"batch {told.get('batch', 1)}"]))
    return f"{report['target']} ({facts})"


def _judged(report: dict[str, Any]) -> str:
    """On what quality was measured."""
    count = report["data"].get("test", {}).get("count", 0)
    if not count or not report["result"]["quality"]:
        return "Quality was not measured."
    return (f"Quality was measured on the built file, on {count:,} held-out samples ({_evaluated(report)}); data of"
            " other domains may give other figures.")  # fmt: skip


def _evaluated(report: dict[str, Any]) -> str:
    """The data that quality was judged on, of all that `data_source` names."""
    return str(report["data_source"]).rpartition("evaluation: ")[2] or "held-out data"


def _index(report: dict[str, Any], task: str) -> list[str]:
    """The figures as the Hub's model-index; only what was measured."""
    known = [f for f in report["result"]["quality"] if f["status"] == "measured" and f["value"] is not None]
    if not known:
        return []
    metrics = [
        {"type": f["name"], "name": f"{f['name']} ({f['unit']})" if f["unit"] else f["name"], "value": f["value"]}
        for f in known
    ]
    dataset = {"name": _evaluated(report), "type": "custom"}
    results = [{"task": {"type": task}, "dataset": dataset, "metrics": metrics}]
    return [f"model-index: {json.dumps([{'name': report['model'], 'results': results}])}"]


def _licence(name: str) -> str:
    """The Hub's identifier of an SPDX licence; what is no single one is "other"."""
    plain = name.lower().strip()
    return plain if plain in _LICENCES else "other"


def _with_interval(figure: dict[str, Any] | None) -> str:
    between = text.interval(figure)
    return text.figure(figure) + (f" ({between})" if between else "")


def _reason(figure: dict[str, Any]) -> str:
    return f" ({figure['reason']})" if figure["reason"] else ""


def _paper(report: dict[str, Any]) -> str:
    paper = report["provenance"].get("paper")
    return f" ({paper})" if paper else ""


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")
