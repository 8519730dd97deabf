"""Names are file names: a pass, metric, runtime, model, target or calibration set is a file in its folder.

Listing reads the folder (and the first docstring line by `ast`), so it imports nothing heavy.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

from edgegen import errors

PACKAGE = Path(__file__).parent
KINDS = (
    "models", "passes", "targets", "runtimes", "metrics", "calibration", "devices", "recipes", "rewrites", "samplers",
    "spaces",
)  # fmt: skip
_DATA_KINDS = ("targets", "calibration", "recipes", "spaces")
_ERRORS: dict[str, type[errors.UsageError]] = {
    "models": errors.ModelError,
    "targets": errors.TargetError,
    "calibration": errors.DataError,
    "passes": errors.RecipeError,
    "recipes": errors.RecipeError,
}


def folder(kind: str) -> Path:
    """The folder of `kind`. targets/ and calibration/ lie inside the package in a wheel and beside it in a checkout."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


@cache
def names(kind: str) -> tuple[str, ...]:
    """All names of `kind`, sorted. Files starting with an underscore are private."""
    suffix = ".toml" if kind in _DATA_KINDS else ".py"
    return tuple(sorted(p.stem for p in folder(kind).glob(f"*{suffix}") if not p.stem.startswith("_")))


def path(kind: str, name: str) -> Path:
    """The file behind a name.

    Raises:
        UsageError: no such name; the message lists what there is and the near match.
    """
    check(kind, name)
    return folder(kind) / f"{name}{'.toml' if kind in _DATA_KINDS else '.py'}"


def check(kind: str, name: str) -> None:
    """Raise the error of `kind` when `name` is not one of its names."""
    known = names(kind)
    if name not in known:
        singular = {"passes": "pass", "calibration": "calibration set"}.get(kind, kind.removesuffix("s"))
        error = _ERRORS.get(kind, errors.UsageError)
        raise error(f"unknown {singular} {name!r}{near(name, known)}; there are: {', '.join(known)}")


def near(name: str, known: tuple[str, ...] | list[str]) -> str:
    """', did you mean ...?' when a known name is close, else an empty string."""
    match = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {match[0]!r}?" if match else ""


def module(kind: str, name: str) -> ModuleType:
    """Import the module behind a name; its own import errors are not hidden."""
    check(kind, name)
    return importlib.import_module(f"edgegen.{kind}.{name}")


def summary(kind: str, name: str) -> str:
    """First docstring line of a Python unit, or `description` of a TOML unit, without importing it."""
    file = path(kind, name)
    if file.suffix == ".toml":
        return str(load_toml(file).get("description", ""))
    source = file.read_text(encoding="utf-8")
    # the docstring alone: compiling whole files took a third of the time that a list takes
    end = source.find('"""', 3) + 3 if source.startswith('"""') else len(source)
    doc = ast.get_docstring(ast.parse(source[:end])) or ""
    return doc.splitlines()[0] if doc else ""


def load_toml(file: Path) -> dict:
    """Parse a TOML file.

    Raises:
        UsageError: the file is not TOML or not readable; names the file and the line.
    """
    import tomllib

    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise errors.UsageError(f"{file}: not a readable TOML file ({error})") from error

