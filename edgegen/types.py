"""The nouns of edgegen: frozen dataclasses that travel between the rooms. Importing this does not import torch."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TASKS = ("classification", "super-resolution", "restoration", "image-to-image", "unconditional")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output. A free dimension is a string (its symbol), a fixed one an int."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    value_range: tuple[float, float] | None = None
    layout: str = "NCHW"


@dataclass(frozen=True)
class Preprocessing:
    """How a uint8 image becomes the network's input: resize, crop, map 0..255 to `value_range`, (x - mean) / std.

    `mean` and `std` are in the units of `value_range`; empty means no normalisation. `resize` is the length of the
    shorter side in pixels (None: as it is), `crop` the centre crop (H, W) (None: none). `colour` is "RGB" or "L".
    """

    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None
    crop: tuple[int, int] | None = None
    colour: str = "RGB"


@dataclass(frozen=True)
class Provenance:
    """Where weights come from and under which licence; `weights_sha256` is over the loaded state, not the file."""

    source: str
    licence: str = "unknown"
    paper: str = ""
    weights_sha256: str = ""


@dataclass(frozen=True)
class PrecisionPlan:
    """What a build should make of a graph: what `quantize` and `cast` write and what `runtimes.*.build` obey.

    precision: one of PRECISIONS. format: "" (the runtime's only one), "u8s8" or "s8s8" (ONNX Runtime Q/DQ), "u8s7" or
    "s8s7" (weights of 7 bits). rest: precision of what is not quantized in an int8 build. float_layers: graph node
    names (exact) left in `rest`; float_types: ONNX operation types left in `rest`. ranges: how activation ranges are
    found where a runtime offers a choice: "mean" (of each sample's extremes: robust, clips rare values such as white
    skies) or "minmax". weights: how weights are stored where that is narrower than the arithmetic: "" (as `precision`
    says), "int8", "int4" (each block of a row with a scale of its own; with INT8 arithmetic each output channel),
    "palette6" or "palette4" (a table of 64 or 16 values a tensor). eight_bits: graph nodes whose weights stay in 8 bits
    where `weights` is "int4" and the arithmetic INT8. scales: ranges of activations that were learned:
    (graph node whose output it is, or graph input; low; high); a build takes these and calibrates those not among them.
    """

    precision: str = "fp32"
    format: str = ""
    rest: str = "fp32"
    float_layers: tuple[str, ...] = ()
    float_types: tuple[str, ...] = ()
    ranges: str = ""
    weights: str = ""
    eight_bits: tuple[str, ...] = ()
    scales: tuple[tuple[str, float, float], ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether anything is narrower than 16 bits: such a build is never a baseline."""
        return self.precision == "int8" or bool(self.weights)

    @property
    def label(self) -> str:
        """Short name for tables, such as `int8 (u8s8, rest fp32)`."""
        if self.precision != "int8":
            return f"{self.precision} (weights {self.weights})" if self.weights else self.precision
        learned = "learned ranges" if self.scales else self.ranges
        parts = [part for part in (self.format, learned, f"rest {self.rest}") if part]
        if self.weights:
            parts.append(f"weights {self.weights}" + (f" but {len(self.eight_bits)} layers" if self.eight_bits else ""))
        if self.float_types:
            parts.append(f"{'+'.join(self.float_types)} in float")
        if self.float_layers:
            parts.append(f"{len(self.float_layers)} layers in float")
        return f"int8 ({', '.join(parts)})"


@dataclass(frozen=True)
class Stage:
    """One exportable graph: an `nn.Module` in eval mode, or (for an .onnx model) a file and no module."""

    name: str
    module: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    onnx: Path | None = None


@dataclass(frozen=True)
class Model:
    """A network with everything needed to feed it and to judge it.

    origin: how to make the unchanged architecture again, as JSON: {"kind": "builtin", "name": "edsr", "config": {}},
    {"kind": "timm", "name": ...}, {"kind": "file", "path": ..., "factory": ..., "sha256": ...}, {"kind": "pt2"|"onnx",
    "path": ...}. options: task settings such as {"scale": 4} for super-resolution or {"calibration": "photos"}; of a
    denoiser {"sampler": {"name": "ddim", "steps": 50}} with "prediction", "schedule", "train_steps" and "labels".
    """

    name: str
    task: str
    stages: tuple[Stage, ...]
    preprocessing: Preprocessing = Preprocessing()
    provenance: Provenance = Provenance("unknown")
    plan: PrecisionPlan = PrecisionPlan()
    origin: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        """The only stage of a single-pass network."""
        if len(self.stages) != 1:
            raise ValueError(f"{self.name} has {len(self.stages)} stages; name the one you mean")
        return self.stages[0]

    def with_module(self, module: Any) -> Model:
        """The same single-stage model around another module."""
        return dataclasses.replace(self, stages=(dataclasses.replace(self.stage, module=module),))


@dataclass(frozen=True)
class Graph:
    """A stage as an ONNX file on disk (float32, static shapes), with the precision plan and its cost.

    program: the same stage as a torch program (`torch.export`, .pt2) for runtimes that convert from torch; None where
    there is none: a model that came as .onnx, or a graph that was rewritten in ONNX. preprocessing: how an image
    becomes the input, for runtimes that take images themselves (Core ML); None: they take tensors. sampler: complete
    settings of the loop that makes an image from runs of this graph (see samplers/); None: one run makes the output.
    partial: with cached blocks, the graph of the steps between, which takes what this one gave beside its output.
    samples: a folder of real inputs, one .npy each, where they are not those that the run has for all its graphs.
    """

    stage: str
    onnx: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    plan: PrecisionPlan = PrecisionPlan()
    macs: int = 0
    params: int = 0
    sha256: str = ""
    program: Path | None = None
    preprocessing: Preprocessing | None = None
    sampler: Mapping[str, Any] | None = None
    partial: Graph | None = None
    samples: Path | None = None


@dataclass(frozen=True)
class Artifact:
    """A file that runs on a target. `files` are all files of it, `path` the main one, `size_bytes` their sum.

    partial: with cached blocks, what runs at the steps between; its files are its own, its bytes count in `size_bytes`.
    """

    runtime: str
    path: Path
    files: tuple[Path, ...]
    plan: PrecisionPlan
    size_bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    partial: Artifact | None = None

    @property
    def parts(self) -> tuple[Artifact, ...]:
        """This one, and the partial one where there is one."""
        return (self,) if self.partial is None else (self, self.partial)

    @property
    def label(self) -> str:
        """`runtime precision`, for tables and messages."""
        return f"{self.runtime} {self.plan.label}"


@dataclass(frozen=True)
class Inspection:
    """What a built file really contains, read back from it.

    layers: layer name -> precision it got. int8_weight_share: share of weight bytes stored as int8 (0..1).
    int8_macs_share: share of MACs computed in int8 (0..1).
    """

    layers: Mapping[str, str]
    int8_weight_share: float
    int8_macs_share: float


@dataclass(frozen=True)
class Problem:
    """A reason why a runtime cannot take a graph, and the rewrite that would cure it."""

    op: str
    layer: str
    rewrite: str


@dataclass(frozen=True)
class Measurement:
    """A number that belongs to one device and one procedure.

    value: the figure itself (latency: the median, p50, in ms). interval: 95% confidence interval of `value`, or None.
    samples: every raw sample where there are any. direction: "lower" or "higher" is better. status: "measured",
    "estimated" or "not measured" (then `value` is NaN and `reason` says why). conditions: device, threads, batch, n,
    seed, feature extractor ... whatever is needed to compare it.
    """

    name: str
    unit: str
    value: float
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] = ()
    direction: str = "lower"
    conditions: Mapping[str, Any] = field(default_factory=dict)
    status: str = "measured"
    reason: str = ""


@dataclass(frozen=True)
class PassResult:
    """The new model; `changed`: layer -> what changed; `skipped`: layer -> why it was left; `notes`: figures."""

    model: Model
    changed: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    needs_recovery: bool = False


@dataclass(frozen=True)
class JetPack:
    """A JetPack release: what it carries. opset: newest ONNX operator set of its parser; dla: cores one can use."""

    version: str
    tensorrt: str
    cuda: str
    opset: int
    dla: int = 0


@dataclass(frozen=True)
class Target:
    """A device read from targets/<name>.toml: facts, each with its source; a figure that is 0 or empty is not known.

    opset: ONNX operator set that graphs are exported in. jetpack: releases that the module takes, `versions["jetpack"]`
    names the one that builds are for. techniques: "latency" -> what makes it faster, "size" -> what only shrinks files.
    thorough_runtimes: more runtimes, whose converters are slow: tried under --thorough alone.
    """

    name: str
    description: str
    runtimes: tuple[str, ...]
    is_host: bool = False
    precisions: tuple[str, ...] = ("fp32",)
    channel_multiple: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int = 0
    bandwidth_bytes_per_s: float = 0.0
    peak_macs_per_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0
    opset: int = 18
    notes: str = ""
    thorough_runtimes: tuple[str, ...] = ()
    compute_capability: str = ""
    jetpack: tuple[JetPack, ...] = ()
    techniques: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def release(self) -> JetPack | None:
        """The JetPack release that builds are for; None on what is no Jetson."""
        return next((entry for entry in self.jetpack if entry.version == self.versions.get("jetpack")), None)

    def width_multiple(self, precision: str) -> int:
        """Channel counts should be a multiple of this for `precision`."""
        return int(self.channel_multiple.get(precision, self.channel_multiple.get("default", 8)))


@dataclass(frozen=True)
class Budget:
    """Limits the result must keep. None: no limit. The unit of max_quality_drop belongs to the task."""

    max_latency_ms: float | None = None
    max_size_bytes: int | None = None
    max_quality_drop: float | None = None


@dataclass(frozen=True)
class Job:
    """All that a pass may look at.

    data: a `data.Dataset` that passes may learn from, or None (self-generated inputs). checkpoints: a folder of this
    step alone in which a long pass may keep its state to resume from, or None. progress(text, fraction 0..1).
    latency(stage) -> Measurement judges a candidate on the target, quality(model) -> Measurement the torch network by
    the task's figure on data that no pass learns from (its `key` names them). operators(probes)
    -> a Measurement each: small networks as JSON (see `probes`), timed on the target into a table that is kept.
    measured_on: the device that times them (`--device`); empty: this machine.
    """

    target: Target
    data: Any = None
    teacher: Model | None = None
    budget: Budget = Budget()
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    checkpoints: Path | None = None
    progress: Callable[[str, float], None] = lambda text, fraction: None
    latency: Callable[[Stage], Measurement] | None = None
    quality: Callable[[Model], Measurement] | None = None
    operators: Callable[[Sequence[Mapping[str, Any]]], Sequence[Measurement]] | None = None
    measured_on: str = ""


@dataclass(frozen=True)
class Bundle:
    """The output folder of a run; `manifest` is its parsed manifest.json. A notebook shows its report."""

    path: Path
    manifest: Mapping[str, Any]

    def report(self) -> dict[str, Any]:
        """report.json: every figure of the bundle; see `report.schema.Report`."""
        return dict(json.loads((self.path / "report.json").read_text(encoding="utf-8")))

    def _repr_html_(self) -> str:
        """report.html in a frame of its own, which runs no scripts and loads nothing."""
        page = self.path / "report.html"
        if not page.is_file():
            return f"<code>{html.escape(str(self.path))}</code>"
        content = html.escape(page.read_text(encoding="utf-8"), quote=True)
        return f'<iframe sandbox srcdoc="{content}" style="width:100%;height:48rem;border:0" title="report"></iframe>'
