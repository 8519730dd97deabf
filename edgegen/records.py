"""What a model says about itself (`RECORD`) and what the user says about it, merged and checked; nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edgegen.errors import ModelError
from edgegen.types import Preprocessing

Size = Annotated[int, Field(gt=0)]
Range = tuple[float, float]
Task = Literal["classification", "super-resolution", "restoration", "image-to-image", "unconditional"]

_FLAGS = {
    "task": "--task",
    "input.shape": "--input-shape",
    "input.value_range": "--value-range",
    "input.mean": "--mean",
    "input.std": "--std",
    "input.colour": "--colour",
    "input.resize": "--resize",
    "input.crop": "--crop",
    "output.value_range": "--output-range",
    "options.scale": "--scale",
}


@dataclass(frozen=True)
class ModelOptions:
    """What the user states about a model; every field that is not None goes before the model's own record.

    input_shape: (1, C, H, W), the 1 may be left out; latents (1, Z). value_range: what pixel 0 and 255 become.
    mean, std: in the units of value_range; () is none. output_range: value range of the images that come out. scale:
    enlargement of a super-resolution network. sampler: settings of a denoiser's sampler, such as {"name": "heun",
    "steps": 20}. config: keyword arguments of the factory. seed: of random weights.
    """

    task: str | None = None
    input_shape: tuple[int, ...] | None = None
    value_range: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    colour: str | None = None
    resize: int | None = None
    crop: tuple[int, int] | None = None
    scale: int | None = None
    output_range: tuple[float, float] | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputRecord(_Strict):
    """The network's input. None means not stated; an empty mean means: no normalisation."""

    shape: tuple[Size, ...] | None = None
    value_range: Range | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    colour: Literal["RGB", "L"] | None = None
    resize: Size | None = None
    crop: tuple[Size, Size] | None = None

    @field_validator("value_range")
    @classmethod
    def _ordered(cls, value: Range | None) -> Range | None:
        return ordered(value)

    @model_validator(mode="after")
    def _normalisation(self) -> InputRecord:
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give as many of both")
        channels = self.shape[1] if self.shape and len(self.shape) == 4 else None
        if self.mean and channels and len(self.mean) not in (1, channels):
            raise ValueError(f"mean and std have {len(self.mean)} values for {channels} channels")
        return self


class OutputRecord(_Strict):
    """The network's output; `value_range` of images. kind: "vector" or "latent" where it is none."""

    shape: tuple[Size, ...] | None = None
    value_range: Range | None = None
    kind: Literal["image", "vector", "latent"] = "image"

    @field_validator("value_range")
    @classmethod
    def _ordered(cls, value: Range | None) -> Range | None:
        return ordered(value)


class FurtherInput(_Strict):
    """An input beside the first, batch 1: noise N(0, 1) without a value range, numbers in it, or an index (int64)."""

    name: str
    shape: tuple[Size, ...]
    dtype: Literal["float32", "int64"] = "float32"
    value_range: Range | None = None

    @field_validator("value_range")
    @classmethod
    def _ordered(cls, value: Range | None) -> Range | None:
        return ordered(value)


class Record(_Strict):
    """The schema of RECORD. inputs: what the network takes beside `input`, in the order of its arguments.

    weights: "factory" says that the factory returns a trained network (else --weights).
    """

    task: Task | None = None
    input: InputRecord = InputRecord()
    inputs: tuple[FurtherInput, ...] = ()
    output: OutputRecord = OutputRecord()
    options: dict[str, Any] = Field(default_factory=dict)
    paper: str = ""
    licence: str = "unknown"
    source: str = ""
    weights: Literal["file", "factory"] = "file"

    @property
    def takes_images(self) -> bool:
        """Whether the input is made from an image: not latents, and 1 or 3 channels."""
        shape = self.input.shape or ()
        return self.task != "unconditional" and len(shape) == 4 and shape[1] in (1, 3)

    @property
    def gives_images(self) -> bool:
        """Whether the output is an image."""
        return self.task != "classification" and self.output.kind == "image"

    def preprocessing(self) -> Preprocessing:
        """How an image becomes the input (the defaults for latents)."""
        given = self.input
        grey = bool(given.shape and len(given.shape) == 4 and given.shape[1] == 1)
        return Preprocessing(
            value_range=given.value_range or (0.0, 1.0),
            mean=given.mean or (),
            std=given.std or (),
            resize=given.resize,
            crop=given.crop,
            colour=given.colour or ("L" if grey else "RGB"),
        )


def ordered(value: Range | None) -> Range | None:
    """Refuse a range whose ends are not in order."""
    if value is not None and not value[0] < value[1]:
        raise ValueError(f"a value range goes from low to high, got {value[0]:g}, {value[1]:g}")
    return value


def complete(raw: Mapping[str, Any], options: ModelOptions, name: str) -> Record:
    """The record with the user's options before it, checked to state everything that is needed.

    Args:
        raw: RECORD as the model's file has it, or {}.
        name: the model's name, for messages.
    Raises:
        ModelError: an unknown or wrong field, or something stated by neither; names the options to give.
    """
    record = _validated(_merged(raw, options, name), name)
    missing = [] if record.task else ["task"]
    if not record.input.shape:
        missing.append("input.shape")
    elif record.takes_images:
        missing += [f"input.{part}" for part in ("value_range", "mean", "std") if getattr(record.input, part) is None]
    if record.task and record.gives_images and record.output.value_range is None:
        missing.append("output.value_range")
    if missing:
        flags = ", ".join(_FLAGS[part] for part in missing)
        none = " ('none' for no normalisation)" if "input.mean" in missing else ""
        raise ModelError(f"{name} does not state its {', '.join(missing)}, and nothing is guessed: give {flags}{none}")
    _check_dimensions(record, name)
    return record


def _merged(raw: Mapping[str, Any], options: ModelOptions, name: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ModelError(f"{name}: RECORD must be a dict, got {type(raw).__name__}")
    merged: dict[str, Any] = {str(key): value for key, value in raw.items()}
    stated = {
        "input": {part: getattr(options, part) for part in ("value_range", "mean", "std", "colour", "resize", "crop")},
        "output": {"value_range": options.output_range},
        "options": {"scale": options.scale, "sampler": _sampler(merged.get("options"), options.sampler, name)},
    }
    stated["input"]["shape"] = options.input_shape and _with_batch(options.input_shape)
    if options.input_shape is not None:  # the record's output shape belongs to the record's input shape
        stated["output"]["shape"] = None
    for part, values in stated.items():
        own = merged.get(part) or {}
        if not isinstance(own, Mapping):
            raise ModelError(f"{name}: RECORD.{part} must be a dict, got {type(own).__name__}")
        merged[part] = {**own, **{key: value for key, value in values.items() if value is not None}}
    if options.input_shape is not None:
        merged["output"].pop("shape", None)
    if options.task is not None:
        merged["task"] = options.task
    return merged


def _sampler(own: Any, asked: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The model's sampler with what the user says of it; another sampler starts from its own defaults."""
    told = dict(own.get("sampler") or {}) if isinstance(own, Mapping) else {}
    if not asked:
        return told or None
    if not told:
        raise ModelError(f"{name} makes its output in one run and takes no sampler; leave --sampler and --steps out")
    return {**({} if asked.get("name", told.get("name")) != told.get("name") else told), **asked}


def _with_batch(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape) if len(shape) == 3 else tuple(shape)


def _validated(merged: dict[str, Any], name: str) -> Record:
    try:
        return Record.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        flag = f" ({_FLAGS[place]})" if place in _FLAGS else ""
        got = "" if first["type"] in ("missing", "value_error") else f", got {str(first['input'])[:60]!r}"
        raise ModelError(f"{name}: {place}{flag}: {first['msg'].removeprefix('Value error, ')}{got}") from error


def _check_dimensions(record: Record, name: str) -> None:
    shape = record.input.shape or ()
    if record.task != "unconditional" and len(shape) != 4:
        raise ModelError(f"{name}: --input-shape of a network for images is 1,C,H,W, got {_text(shape)}")
    if len(shape) < 2 or shape[0] != 1:
        raise ModelError(f"{name}: --input-shape starts with the batch, which must be 1, got {_text(shape)}")
    scale = record.options.get("scale")
    if scale is not None and (type(scale) is not int or scale < 1):
        raise ModelError(f"{name}: --scale must be a whole number of 1 or more, got {scale!r}")


def _text(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))
