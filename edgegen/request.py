"""What a user asks of `compress`, checked before anything is written."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgegen.errors import BundleError, RecipeError
from edgegen.types import Budget


@dataclass(frozen=True)
class Request:
    """Everything on the command line of `edgegen compress`; the same object from Python.

    data: what the passes may learn from (a path). eval_data: what the result is judged on (a path; without it a part
    of `data` is held out). calibration: name of a calibration set or a path. recipe: a preset name or a .toml file;
    empty: chosen by what the model allows. kept: passes kept even when they do not pay. features: the extractor of the
    perceptual distance and of KID. max_memory_bytes: limit of each worker process. device: where latency is
    measured (see devices/_spec.py); empty: here, when the target is this host. resolutions: (H, W) input sizes that
    the bundle is for; everything is decided at the first one, and the same build is made for each further one.
    thorough: the runtimes whose converters are slow are tried too, and the calibration curve may take as long as it
        does. train_device: where networks learn: cpu, cuda, cuda:N, or auto, which is CUDA where torch sees it.
    """

    model: str
    target: str = "cpu"
    weights: Path | None = None
    data: Path | None = None
    eval_data: Path | None = None
    calibration: str = ""
    calibration_images: int = 100
    recipe: str = ""
    kept: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)
    quality_unit: str = ""
    min_psnr: float | None = None
    out: Path | None = None
    resume: bool = False
    latency_only: bool = False
    seed: int = 0
    threads: int = 0
    samples: int = 0
    features: str = ""
    max_memory_bytes: int = 0
    model_options: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    resolutions: tuple[tuple[int, int], ...] = ()
    thorough: bool = False
    train_device: str = "auto"
    command: str = ""

    def identity(self) -> dict[str, Any]:
        """The part that decides the result, for the key of the run's folder."""
        values = dataclasses.asdict(self)
        for name in ("resume", "command", "max_memory_bytes", "train_device"):
            values.pop(name)
        return values


def parse_drop(text: str) -> tuple[float, str]:
    """`0.5` -> (0.5, ""), `2%` -> (2.0, "%").

    Raises:
        RecipeError: not a number, or negative.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)(?:dB|points?)?\s*", text)
    if not match:
        raise RecipeError(f"--max-quality-drop must be a number of zero or more, such as 0.5 or 2%, got {text!r}")
    return float(match[1]), match[2]


def parse_quantity(text: str, flag: str, units: dict[str, float]) -> float:
    """`5ms` or `2MB` as a number in the smallest unit of `units` (a bare number is in the first unit).

    Raises:
        RecipeError: not a positive number with one of the units.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    known = {name.lower(): factor for name, factor in units.items()}
    unit = (match[2] or next(iter(units))).lower() if match else ""
    if not match or unit not in known or float(match[1]) == 0:
        raise RecipeError(f"{flag} must be a positive number with a unit of {', '.join(units)}, got {text!r}")
    return float(match[1]) * known[unit]


def parse_resolutions(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """["256x256", "384x640"] -> ((256, 256), (384, 640)): height, then width, each size once.

    Raises:
        RecipeError: not HxW in whole pixels.
    """
    found = []
    for text in texts:
        match = re.fullmatch(r"\s*([1-9]\d{0,4})\s*[xX]\s*([1-9]\d{0,4})\s*", text)
        if not match:
            raise RecipeError(f"--resolution must be HEIGHTxWIDTH in pixels, such as 384x640, got {text!r}")
        found.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(found))


def check_out(out: Path, resume: bool) -> None:
    """Refuse an output folder that cannot take the bundle.

    Raises:
        BundleError: not a folder, not empty (and not resuming), or not writable; names what to do.
    """
    if out.exists() and not out.is_dir():
        raise BundleError(f"--out {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        if not resume:
            raise BundleError(f"--out {out}: is not empty; choose another folder, or --resume to finish that run")
        if not (out / "manifest.json").is_file():
            raise BundleError(f"--out {out}: holds files that are not a bundle; choose another folder")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise BundleError(f"--out {out}: {parent} is a file; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK) or _read_only(parent):
        raise BundleError(f"--out {out}: {parent} is not writable; choose another folder")


def _read_only(folder: Path) -> bool:
    # Root passes every access() check, so a read-only file system shows only in its flags.
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
