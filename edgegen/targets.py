"""Targets: TOML facts about devices, checked field by field, to `types.Target`.

Every figure needs an entry of the same name in [sources] that says where it comes from. A file with `alias` stands for
another target. `threads = 0` on the host means all of its cores, `memory_bytes = 0` all of its memory.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from edgegen import errors, registry
from edgegen.devices import local
from edgegen.types import JetPack, Target

FIGURES = (
    "memory_bytes", "bandwidth_bytes_per_s", "peak_macs_per_s", "channel_multiple", "versions", "opset",
    "compute_capability", "jetpack", "techniques",
)  # fmt: skip
"""Fields that need a source when a file states them."""

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Technique = Literal["fp16", "bf16", "int8", "int8-weights", "palette6", "palette4", "prune-channels", "2:4-sparsity"]
Version = Annotated[str, pydantic.Field(pattern=r"^\d+(\.\d+)*$")]
Count = Annotated[int, pydantic.Field(ge=0)]
Positive = Annotated[int, pydantic.Field(ge=1)]


class _JetPack(pydantic.BaseModel):
    """One [[jetpack]] entry."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    version: Version
    tensorrt: Version
    cuda: Version
    opset: int = pydantic.Field(ge=9, le=25)
    dla: Count = 0


class _File(pydantic.BaseModel):
    """What a target file may say."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    description: str = pydantic.Field(min_length=1)
    runtimes: list[str] = pydantic.Field(min_length=1)
    thorough_runtimes: list[str] = []
    is_host: bool = False
    precisions: list[Precision] = pydantic.Field(min_length=1)
    channel_multiple: dict[Literal["default", "fp32", "fp16", "bf16", "int8"], Positive] = {}
    memory_bytes: Count = 0
    bandwidth_bytes_per_s: float = pydantic.Field(default=0.0, ge=0)
    peak_macs_per_s: dict[Precision, Annotated[float, pydantic.Field(gt=0)]] = {}
    versions: dict[str, str] = {}
    sources: dict[str, str] = {}
    threads: Count = 0
    opset: int = pydantic.Field(default=18, ge=13, le=25)
    compute_capability: Version = ""
    jetpack: list[_JetPack] = []
    techniques: dict[Literal["latency", "size"], list[Technique]] = {}
    notes: str = ""


class _Alias(pydantic.BaseModel):
    """Another name for a target."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    alias: str
    description: str = ""


def load(name_or_path: str | Path) -> Target:
    """The target of that name (a file in targets/), or of a TOML file given by its path.

    Raises:
        TargetError: no such name (with the near match) or file, or a file with errors: the message names the file, the
            field, what it is, and what is allowed.
    """
    file = _file(name_or_path)
    table = _table(file)
    if "alias" in table:
        alias = _checked(_Alias, table, file).alias
        file = _file(alias)
        table = _table(file)
        if "alias" in table:
            raise errors.TargetError(f"{file}: an alias must name a target itself, got another alias {alias!r}")
    stated = _checked(_File, table, file)
    _check_runtimes(stated, file)
    _check_sources(stated, file)
    _check_jetpack(stated, file)
    _check_techniques(stated, file)
    facts = stated.model_dump()
    for field in ("runtimes", "thorough_runtimes", "precisions"):
        facts[field] = tuple(facts[field])
    facts["jetpack"] = tuple(JetPack(**entry) for entry in facts["jetpack"])
    facts["techniques"] = {effect: tuple(named) for effect, named in facts["techniques"].items()}
    if stated.is_host:
        facts["threads"] = stated.threads or local.cores()
        facts["memory_bytes"] = stated.memory_bytes or local.memory_bytes()
    return Target(name=file.stem, **facts)


def _file(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text:
        file = Path(text)
        if not file.is_file():
            raise errors.TargetError(f"no target file {text!r}; give an existing .toml file, or one of the names: "
                                     f"{', '.join(registry.names('targets'))}")
        return file
    return registry.path("targets", text)


def _table(file: Path) -> dict[str, Any]:
    try:
        return registry.load_toml(file)
    except errors.UsageError as error:
        raise errors.TargetError(str(error)) from error


def _checked(schema: type[Any], table: Mapping[str, Any], file: Path) -> Any:
    try:
        return schema.model_validate(table)
    except pydantic.ValidationError as error:
        told = "; ".join(_told(problem, schema) for problem in error.errors())
        raise errors.TargetError(f"{file}: {told}") from error


def _told(problem: Any, schema: type[pydantic.BaseModel]) -> str:
    """One line about one problem: field, what is wrong, what was given."""
    where = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    if problem["type"] == "extra_forbidden":
        known = list((_JetPack if where.startswith("jetpack.") else schema).model_fields)
        return f"unknown field {where!r}{registry.near(where, known)}; allowed: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"the field {where!r} is missing"
    if problem["type"] == "string_pattern_mismatch":
        return f"{where} must be a version such as '10.3', got {problem['input']!r}"
    wish = problem["msg"].removeprefix("Input should be ").replace("List should have", "a list with")
    return f"{where} must be {wish}, got {problem['input']!r}"


def _check_sources(stated: _File, file: Path) -> None:
    for field in FIGURES:
        if field in stated.model_fields_set and field not in stated.sources:
            raise errors.TargetError(f"{file}: {field} has no source; add [sources] {field} = \"where it is from\"")
    if unknown := sorted(set(stated.sources) - set(_File.model_fields)):
        raise errors.TargetError(f"{file}: a source for {unknown[0]!r}, which is no field"
                                 f"{registry.near(unknown[0], list(_File.model_fields))}")
    if lost := sorted(set(stated.peak_macs_per_s) - set(stated.precisions)):
        raise errors.TargetError(f"{file}: peak_macs_per_s.{lost[0]} is given, but precisions has no {lost[0]!r}")


def _check_runtimes(stated: _File, file: Path) -> None:
    known = registry.names("runtimes")
    for field in ("runtimes", "thorough_runtimes"):
        for name in getattr(stated, field):
            if name not in known:
                raise errors.TargetError(f"{file}: {field} names {name!r}{registry.near(name, known)}, which is none; "
                                         f"there are: {', '.join(known)}")


def _check_techniques(stated: _File, file: Path) -> None:
    """A technique changes latency or it does not; one of a precision needs that precision."""
    faster, smaller = (stated.techniques.get(effect, []) for effect in ("latency", "size"))
    if both := sorted(set(faster) & set(smaller)):
        raise errors.TargetError(f"{file}: techniques.size must not repeat what techniques.latency names, "
                                 f"got {both[0]!r}")
    for name in faster:
        if name in typing.get_args(Precision) and name not in stated.precisions:
            raise errors.TargetError(f"{file}: techniques.latency names {name!r}, but precisions has no {name!r}")


def _check_jetpack(stated: _File, file: Path) -> None:
    """The release that builds are for is one of the table, agrees with `versions`, and its parser takes `opset`."""
    releases = {entry.version: entry for entry in stated.jetpack}
    chosen = stated.versions.get("jetpack")
    if not releases and chosen is None:
        return
    if chosen not in releases:
        raise errors.TargetError(f"{file}: versions.jetpack must be one of the [[jetpack]] entries "
                                 f"({', '.join(releases) or 'there are none'}), got {chosen!r}")
    for name in ("tensorrt", "cuda"):
        if (carried := getattr(releases[chosen], name)) != stated.versions.get(name):
            raise errors.TargetError(f"{file}: versions.{name} must be what JetPack {chosen} carries, {carried!r}, "
                                     f"got {stated.versions.get(name)!r}")
    if stated.opset > releases[chosen].opset:
        raise errors.TargetError(f"{file}: opset must be at most {releases[chosen].opset}, the newest that the parser "
                                 f"of JetPack {chosen} takes, got {stated.opset}")
