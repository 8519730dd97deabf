"""Names and files to a `Model`: a built-in name, timm:NAME, FILE.py:FACTORY, a torch export (.pt2), an .onnx file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen import files, folders, foreign, origins, records, registry, samplers
from edgegen.errors import ModelError
from edgegen.records import ModelOptions, Record
from edgegen.types import Model, Provenance, Stage, TensorSpec

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ModelOptions", "Record", "capabilities", "load_model"]

_TRAINABLE = ("builtin", "timm", "file")


def load_model(
    spec: str,
    *,
    weights: Path | None = None,
    options: ModelOptions | None = None,
    latency_only: bool = False,
) -> Model:
    """Load a network with everything needed to feed it and to judge it; eval mode, float32.

    Args:
        spec: a built-in name, `timm:NAME`, `FILE.py:FACTORY` (that code runs here), `FILE.pt2` or `FILE.onnx`.
        weights: .safetensors or torch weights, or a model folder of diffusers, whose sizes go before the record's;
            without them only what ships weights, or returns a trained network.
        options: what the user states; goes before the model's own record.
        latency_only: allow random weights (seeded; norms are randomised, so that no branch folds away); the model's
            options then say {"latency_only": True} and nothing made from it may claim quality.
    Raises:
        ModelError: unknown name, unusable file or weights, a factory or a forward pass that fails, or something that
            neither the record nor the options state. MissingExtra: torch or timm is not installed.
    """
    options = options or ModelOptions()
    kind, name = _kind(spec)
    if kind in ("pt2", "onnx"):
        if weights is not None:
            raise ModelError(f"{spec} carries its own weights; --weights does not apply")
        read = foreign.onnx_stage if kind == "onnx" else foreign.pt2_stage
        stage, record, digest = read(Path(spec), options, name)
        origin = {"kind": kind, "path": str(Path(spec).absolute())}
        return _model(name, stage, record, origin, digest, latency_only)
    facts: dict[str, Any] = {}
    if weights is not None and Path(weights).is_dir():
        weights, options, facts = folders.opened(name, kind, Path(weights), options)
    origin = _origin(kind, spec, options)
    raw = folders.with_facts(_raw_record(origin, options), facts)
    record = records.complete(raw, options, name)
    module = _network(origin, record, weights, latency_only, options.seed, name)
    stage = _stage(module, record, name)
    from edgegen.weights import state_hash

    return _model(name, stage, record, origin, state_hash(module), latency_only)


def capabilities(model: Model) -> frozenset[str]:
    """What a model allows: "train" (passes that change or train the network) for torch architectures made by code."""
    return frozenset({"train"} if model.origin.get("kind") in _TRAINABLE else ())


def _kind(spec: str) -> tuple[str, str]:
    """(kind, name) of a model argument; the name goes into file names."""
    path, _, factory = spec.rpartition(":")
    if spec.startswith("timm:"):
        return "timm", spec.removeprefix("timm:")
    if path.endswith(".py") and factory:
        return "file", re.sub(r"\W+", "_", Path(path).stem if factory in ("create", "build", "main") else factory)
    if spec.endswith(".py"):
        raise ModelError(f"{spec}: name the function that makes the network, as {spec}:FACTORY")
    suffix = Path(spec).suffix
    if suffix in (".pt2", ".onnx"):
        if not Path(spec).is_file():
            raise ModelError(f"model {spec}: no such file")
        return suffix[1:], re.sub(r"\W+", "_", Path(spec).stem)
    if "/" in spec or suffix in (".pth", ".pt", ".safetensors"):
        raise ModelError(
            f"model {spec}: give a built-in name, timm:NAME, FILE.py:FACTORY with --weights FILE, FILE.pt2 or FILE.onnx"
        )
    registry.check("models", spec)
    return "builtin", spec


def _origin(kind: str, spec: str, options: ModelOptions) -> dict[str, Any]:
    config = dict(options.config)
    if kind == "builtin":
        return {"kind": kind, "name": spec, "config": config}
    if kind == "timm":
        return {"kind": kind, "name": origins.check_timm(spec.removeprefix("timm:")), "config": config}
    path, _, factory = spec.rpartition(":")
    if not Path(path).is_file():
        raise ModelError(f"model file {path}: no such file")
    where, digest = str(Path(path).absolute()), files.sha256(Path(path))
    return {"kind": kind, "path": where, "factory": factory, "sha256": digest, "config": config}


def _raw_record(origin: Mapping[str, Any], options: ModelOptions) -> Mapping[str, Any]:
    """RECORD of a built-in or of a user's file (RECORDS[factory] goes first), or what timm states."""
    if origin["kind"] == "builtin":
        code = registry.module("models", origin["name"])
        if options.config and hasattr(code, "record"):
            return code.record(**options.config)
        raw = dict(code.RECORD)
        return {**raw, "output": {**raw.get("output", {}), "shape": None}} if options.config else raw
    if origin["kind"] == "timm":
        return _timm_record(origin["name"])
    module = origins.code(Path(origin["path"]))
    several = getattr(module, "RECORDS", None)
    if isinstance(several, Mapping) and origin["factory"] in several:
        return several[origin["factory"]]
    return getattr(module, "RECORD", {})


def _timm_record(name: str) -> dict[str, Any]:
    """timm's own statement of input size, normalisation, test-time resize and licence."""
    timm = origins.require("timm")
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return {"task": "classification", "source": f"timm:{name}"}
    channels, height, width = config.input_size
    return {
        "task": "classification",
        "input": {
            "shape": [1, channels, height, width],
            "value_range": [0, 1],
            "mean": list(config.mean),
            "std": list(config.std),
            "resize": round(min(height, width) / (config.crop_pct or 1.0)),
            "crop": [height, width],
        },
        "licence": config.license or "unknown",
        "source": f"timm:{name}",
        "paper": "",
    }


def _network(
    origin: Mapping[str, Any], record: Record, weights: Path | None, latency_only: bool, seed: int, name: str
) -> nn.Module:
    """Make the network and give it weights; refuses a network that nobody trained unless only latency matters."""
    from edgegen.weights import load_into, read_state

    torch = origins.require("torch")
    shipped = registry.folder("models") / "weights" / f"{name}.safetensors"
    trained_by_factory = origin["kind"] == "file" and record.weights == "factory"
    other_sizes = latency_only and origin.get("config")  # the weights that ship are of the sizes that ship
    if weights is None and origin["kind"] == "builtin" and shipped.is_file() and not other_sizes:
        weights = shipped
    if weights is None and not trained_by_factory and not latency_only:
        state_it = "; or state 'weights': 'factory' in RECORD when the factory returns a trained network"
        raise ModelError(
            f"{name} comes without trained weights: give --weights FILE, or --latency-only for timing without quality"
            f"{state_it if origin['kind'] == 'file' else ''}"
            f"{f'. Published weights: {record.source}' if origin['kind'] == 'builtin' else ''}"
        )
    state = _published(origin, read_state(Path(weights))) if weights is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = origins.create(origin)
        if state is None and not trained_by_factory:
            _randomise_norms(module)
    module = module.float().eval()
    if state is not None:
        load_into(module, state, str(weights))
    return module


def _published(origin: Mapping[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Weights in a layout that others publish, under the names of the built-in network (its `from_published`)."""
    if origin["kind"] != "builtin":
        return state
    convert = getattr(registry.module("models", origin["name"]), "from_published", None)
    return convert(state, dict(origin["config"])) if convert is not None else state


def _randomise_norms(module: nn.Module) -> None:
    """Scales of norms uniform in [0.5, 1.5]: fresh networks often have zeros there, which compilers fold away."""
    torch = origins.require("torch")
    for part in module.modules():
        scale = getattr(part, "weight", None)
        if "norm" in type(part).__name__.lower() and isinstance(scale, torch.nn.Parameter) and scale.ndim == 1:
            with torch.no_grad():
                scale.uniform_(0.5, 1.5)


def _stage(module: nn.Module, record: Record, name: str) -> Stage:
    """The stage, with the output's real shape from a forward pass on zeros; a denoiser also takes time and label."""
    settings, given = samplers.of(record.options), record.input.shape or ()
    if settings is None:
        layouts = {1: "N", 2: "NC", 4: "NCHW"}
        more = tuple(TensorSpec(one.name, one.shape, one.dtype, one.value_range, layouts.get(len(one.shape), ""))
                     for one in record.inputs)  # fmt: skip
    else:
        told = samplers.inputs(settings).items()
        more = tuple(TensorSpec(key, (1,), value_range=span, layout="N") for key, span in told)
    shape = foreign.forward_shape(module, given, name, *more)
    if settings is not None and shape != given:
        raise ModelError(f"{name}: a denoiser gives what it takes, {given}; got {shape}")
    stage = foreign.stage(module, record, ("input" if settings is None else "sample", shape, "output"), name)
    return dataclasses.replace(stage, inputs=(*stage.inputs, *more))


def _model(
    name: str, stage: Stage, record: Record, origin: Mapping[str, Any], digest: str, latency_only: bool
) -> Model:
    options = dict(record.options)
    if record.task == "super-resolution":
        options["scale"] = _scale(stage.inputs[0], stage.outputs[0], options.get("scale"), name)
    if options.get("sampler") and stage.inputs[0].shape[1] not in (1, 3):
        options["sampler"] = {"clip": 0.0, **options["sampler"]}  # latents know no -1..1
    if latency_only:
        options["latency_only"] = True
    place = Path(str(origin.get("path", origin.get("name")))).name  # not the whole path: it would go into the bundle
    return Model(
        name=name,
        task=str(record.task),
        stages=(stage,),
        preprocessing=record.preprocessing(),
        provenance=Provenance(record.source or place, record.licence, record.paper, digest),
        origin=dict(origin),
        options=options,
    )


def _scale(given: TensorSpec, out: TensorSpec, stated: Any, name: str) -> int:
    """The enlargement that the network really makes, which must be the stated one."""
    (height, width), (tall, wide) = given.shape[-2:], out.shape[-2:]
    real = int(tall) // int(height)
    if int(tall) != real * int(height) or int(wide) != real * int(width) or stated not in (None, real):
        raise ModelError(
            f"{name}: super-resolution from {given.shape} gives {out.shape}, stated scale {stated}; set --scale, --task"
        )
    return real
