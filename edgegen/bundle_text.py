"""The texts of a bundle: its README and its licence notes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from edgegen import bundle_samples, registry
from edgegen.types import Artifact, Model, TensorSpec


def readme(
    model: Model,
    artifacts: tuple[Artifact, ...],
    target: str,
    stamps: Iterable[str],
    listed: Iterable[str],
    headline: str = "",
) -> str:
    """README.md: what the bundle is, how to run, check, reload and reproduce it.

    Args:
        artifacts: with paths relative to the bundle, the main one first.
        listed: the names of the files in it.
        headline: the sentence of its report.
    """
    main, script = artifacts[0], bundle_samples.script_name(target)
    warnings = "".join(f"> **{stamp}**\n\n" for stamp in stamps)
    run = f"python3 {script} --seed 1" if model.task == "unconditional" else f"python3 {script} photo.png"
    reload_it = ""
    if "weights.safetensors" in listed:
        reload_it = (
            "\n## In PyTorch\n\nIn this folder, with `pip install 'edgegen[torch]'`:\n\n"
            "```python\nfrom edgegen import bundle\n\n"
            'model = bundle.load_model(".")\n'
            "model.stage.module  # the compressed nn.Module, in eval mode\n```\n"
        )
        if model.origin.get("kind") == "file":
            reload_it += "\nThis runs `model_code/`, a copy of the Python file that the model came from.\n"
    told = f"**{headline}**\n\n" if headline else ""
    return f"""# {model.name} for {target}

{warnings}{told}A network for {model.task}, built by edgegen for the target {target}. `{main.path}` \
({main.size_bytes / 1e6:.2f} MB) is what runs there, in {main.runtime}; its precision is {main.plan.label}. \
How it was made, and every measurement: open `report.html` in a browser; it needs no network.

## Run it

```sh
pip install numpy pillow {bundle_samples.needs(main)}
{run}
```

It needs nothing of edgegen. What goes in and what comes out:

{_contract(model, main)}
{_sizes(artifacts)}
## Check it

```sh
pip install edgegen
edgegen verify .
```

compares every file with its hash, and the outputs on the inputs in `golden/` with the expected ones. How fast it is on
your device: `edgegen profile . --device ssh://user@host`. `edgegen reproduce FOLDER` makes the bundle again, and
compares the two; start it where the paths in `request.json` begin, and with
`pip install 'edgegen[torch,onnxruntime,openvino]'`.
{reload_it}
## What is in it

{_files(listed, {file.as_posix() for one in artifacts for file in one.files})}
## Licence

The weights: {model.provenance.licence} ({model.provenance.source}). See `licences/`.
"""


def _sizes(artifacts: tuple[Artifact, ...]) -> str:
    """The files of further input sizes."""
    more = bundle_samples.further(artifacts)
    return "".join(f"- For {_spec(one.inputs[0])}: `{one.path}`\n" for one in more)


def _contract(model: Model, artifact: Artifact) -> str:
    how = model.preprocessing
    lines = [f"Input {_spec(spec)}" for spec in artifact.inputs]
    lines += [f"Output {_spec(spec)}" for spec in artifact.outputs]
    if model.task == "unconditional":
        lines.append("Latents are drawn from N(0, 1).")
    else:
        size = [f"shorter side to {how.resize} pixels"] if how.resize else []
        size += [f"centre crop {how.crop[0]}x{how.crop[1]}"] if how.crop else []
        mean = f", then (x - {list(how.mean)}) / {list(how.std)}" if how.mean else ""
        shown = f"{how.colour}, {', '.join(size)}" if size else how.colour
        lines.append(f"Images: {shown}; 0..255 to {how.value_range[0]:g}..{how.value_range[1]:g}{mean}.")
    return "\n".join(f"- {line}" for line in lines)


def _spec(spec: TensorSpec) -> str:
    span = f", {spec.value_range[0]:g}..{spec.value_range[1]:g}" if spec.value_range else ""
    return f"`{spec.name}`: {spec.dtype} {tuple(spec.shape)} {spec.layout}{span}"


_ABOUT = {
    "MODEL_CARD.md": "the figures, as the Hugging Face Hub shows them",
    "README.md": "this page",
    "android/": "an app project that runs it on a phone",
    "architecture.json": "in what the network differs from the original, to make it again in PyTorch",
    "golden/": "inputs, and the outputs that it must give on them",
    "images/": "the pictures of the report",
    "ios/": "an app project that runs it on a phone",
    "licences/": "of the weights, of edgegen, and of what else went into it",
    "manifest.json": "what is in the bundle, with the hash of every file",
    "model.onnx": "the network as ONNX, as it was before the runtime's own build",
    "model_code/": "the Python file that the model came from",
    "recipe.toml": "the passes that were asked for, with their options",
    "report.html": "every measurement, to look at",
    "report.json": "the same with every sample, for programs",
    "request.json": "the request, for `edgegen reproduce`",
    "samplers/": "the loop that makes an image of many runs of the network",
    "weights.safetensors": "the weights for PyTorch",
}


def _files(listed: Iterable[str], artifacts: set[str]) -> str:
    """A line for each file, or for each folder whose files belong together."""
    folders = tuple(name for name in _ABOUT if name.endswith("/"))
    shown = {next((folder for folder in folders if name.startswith(folder)), name) for name in listed}
    lines = []
    for name in sorted(shown):
        about = "what runs on the target" if name in artifacts else _ABOUT.get(name, "")
        about = "runs it on an image or on latents, without edgegen" if name.startswith("run_") else about
        lines.append(f"- `{name}`{': ' * bool(about)}{about}\n")
    return "".join(lines)


def licences(model: Model, artifacts: Iterable[Artifact]) -> dict[str, str]:
    """File name to text: edgegen's own licence, the model's, and those of the packages that made the artifacts."""
    packages = sorted({name for artifact in artifacts for name in artifact.versions})
    origin = model.provenance
    return {
        "edgegen.txt": _own(),
        "model.txt": f"Licence of the weights: {origin.licence}\nSource: {origin.source}\n"
        f"Paper: {origin.paper or '-'}\n",
        "dependencies.txt": "Packages that made or run the files here; none of their code is in this bundle.\n"
        + "".join(f"{name} {_package(name)}\n" for name in packages),
    }


def _own() -> str:
    beside = registry.PACKAGE.parent / "LICENSE"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    for file in importlib.metadata.files("edgegen") or ():
        if file.name == "LICENSE":
            return Path(str(file.locate())).read_text(encoding="utf-8")
    return "Apache License, Version 2.0\n"


def _package(name: str) -> str:
    try:
        found = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return "(licence not recorded)"
    fields = found.json
    text = str(fields.get("license_expression") or fields.get("license") or "").split("\n")[0]
    lines = [line for line in fields.get("classifier") or () if line.startswith("License")]
    named = [line.rpartition("::")[2].strip() for line in lines]
    return f"{fields.get('version')}: {text or ', '.join(named) or 'licence not stated'}"
