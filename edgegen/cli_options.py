"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import typer

from edgegen import errors, registry

if TYPE_CHECKING:
    from edgegen.types import Budget

DROP_HELP = (
    "Allowed loss of quality. The unit belongs to the task: points of top-1 (classification), dB of PSNR to the"
    " reference images (super-resolution, restoration), dB of PSNR to the teacher below 50 dB (image-to-image),"
    " KID x 1000, two-sided (unconditional); with % the perceptual distance to the teacher."
)
MODEL_HELP = "Built-in name, timm:NAME, FILE.py:FACTORY, FILE.pt2 or FILE.onnx."
WEIGHTS_HELP = "Weights: .safetensors, .pth without code in it, or a model folder of diffusers."
SAMPLER_HELP = "How a denoiser makes images: a sampler's name, then settings, such as 'heun,spacing=karras,rho=7'."
CONFIG_HELP = "Sizes of the network, as its factory names them, such as size=1024,part=synthesis or widths=64:32."
RESOLUTION_HELP = "Input size HxW, such as 384x640; once for each: one bundle for all, decided at the first one."
THOROUGH_HELP = (
    "Also try the target's runtimes whose converters are slow (cpu: litert, executorch), and take the time for the"
    " whole calibration curve: quality against the number of calibration samples."
)
TRAIN_DEVICE_HELP = "Where networks learn: cpu, cuda, cuda:N, or auto (CUDA where torch sees it)."
JSON_HELP = "Print report.json instead of the table; events, one JSON object a line, on standard error."
TIMES = {"ms": 1.0, "s": 1e3, "us": 1e-3}
SIZES = {"MB": 1e6, "kB": 1e3, "GB": 1e9, "MiB": 2**20, "GiB": 2**30}


def named(kind: str, help: str) -> Any:
    """An option whose value may be a name of `kind` (`edgegen list KIND`), which the shell completes."""
    return typer.Option(help=help, autocompletion=lambda incomplete: _beginning(kind, incomplete))


def _beginning(kind: str, incomplete: str) -> list[tuple[str, str]]:
    """(name, line about it) of the names that begin so."""
    return [(name, registry.summary(kind, name)) for name in registry.names(kind) if name.startswith(incomplete)]


def need_torch(why: str) -> None:
    """Say how to install torch where it is missing."""
    if importlib.util.find_spec("torch") is None:
        raise errors.MissingExtra("torch", why, "torch")


def need_one_process(command: str) -> None:
    """Refuse a command that would run once in every process of torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        raise errors.UsageError(
            f"edgegen {command} is one process, and torchrun started {os.environ['WORLD_SIZE']}: start it without"
            " torchrun; edgegen evaluate, and a script of yours around a pass, run under it"
        )


def budget(max_latency: str, max_size: str, max_quality_drop: str) -> tuple[Budget, str]:
    """The limits that were given, and the unit of the drop where the text names one.

    Raises:
        RecipeError: a text that is no number with a unit.
    """
    from edgegen.request import parse_drop, parse_quantity
    from edgegen.types import Budget

    drop, unit = parse_drop(max_quality_drop) if max_quality_drop else (None, "")
    latency = parse_quantity(max_latency, "--max-latency", TIMES) if max_latency else None
    size = int(parse_quantity(max_size, "--max-size", SIZES)) if max_size else None
    return Budget(latency, size, drop), unit


def model_options(**values: Any) -> dict[str, Any]:
    """The options of a model that were given."""
    return {name: value for name, value in values.items() if value not in ("", None)}


def floats(text: str, flag: str, count: int = 0) -> tuple[float, ...] | None:
    """`0,1` as numbers; None for an empty text.

    Raises:
        ModelError: not numbers, or not `count` of them.
    """
    if not text:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or (count and len(found) != count):
        raise errors.ModelError(f"{flag} must be {count or 'one or more'} numbers with commas between, got {text!r}")
    return found


def integers(text: str, flag: str) -> tuple[int, ...] | None:
    """`1,3,224,224` as positive integers; None for an empty text.

    Raises:
        ModelError: not positive whole numbers.
    """
    values = floats(text, flag)
    if values is not None and not all(value == int(value) and value > 0 for value in values):
        raise errors.ModelError(f"{flag} must be positive whole numbers with commas between, got {text!r}")
    return tuple(int(value) for value in values) if values is not None else None


def config(text: str) -> dict[str, Any] | None:
    """`size=1024,light=true,widths=16:16:8` as keyword arguments of a factory; None for an empty text.

    Raises:
        ModelError: a part that is not NAME=VALUE.
    """
    found: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not name.isidentifier() or not value:
            raise errors.ModelError(f"--config {text}: {part!r} is not NAME=VALUE, such as size=64 or widths=64:32")
        values = [_plain(piece) for piece in value.split(":")]
        found[name] = values if ":" in value else values[0]
    return found or None


def _plain(text: str) -> Any:
    """true, false, a whole number, a number, else the text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def sampler(text: str, steps: int) -> dict[str, Any] | None:
    """`ddim,eta=0.5,timesteps=900:500` and a number of steps as settings; None when neither is given.

    Raises:
        ModelError: a part that is not NAME=VALUE.
    """
    name, *parts = text.split(",") if text else [""]
    if "=" in name:
        name, parts = "", [name, *parts]
    found: dict[str, Any] = {"name": name} if name else {}
    for part in parts:
        key, sign, value = part.partition("=")
        if not sign or not key:
            raise errors.ModelError(f"--sampler {text}: {part!r} is not NAME=VALUE, such as eta=0.5")
        values = [_plain(piece.strip()) for piece in value.split(":")]
        found[key.strip()] = values if ":" in value else values[0]
    if steps:
        found["steps"] = steps
    return found or None
