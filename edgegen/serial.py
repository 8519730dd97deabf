"""Dataclasses to JSON and back, by their annotations: no pickle, and nothing but the declared fields is accepted.

Not-finite floats become the strings "NaN", "Infinity" and "-Infinity", so that the text is JSON everywhere. What lies
in a field of type `Any` comes back as JSON knows it: tuples as lists, paths as strings.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from edgegen import errors

T = TypeVar("T")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any) -> Any:
    """A JSON value of dataclasses, mappings, sequences, paths, numbers (numpy scalars too) and strings.

    Raises:
        UsageError: something in `value` has no JSON form, such as a module or an array; names its type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, collections.abc.Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(to_json(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _not_finite_name(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy scalar, without importing numpy
        return to_json(value.item())
    raise errors.UsageError(f"a {type(value).__name__} has no JSON form; allowed: dataclasses, mappings, sequences, "
                            "paths, numbers, strings")


def from_json(kind: type[T], data: Any, *, where: str = "") -> T:
    """A value of type `kind` (a dataclass or any annotation that one uses) from what `to_json` wrote.

    Raises:
        UsageError: a missing, unknown or wrong field; the message names its place, such as `Artifact.inputs[0].name`.
    """
    return typing.cast(T, _read(kind, data, where or getattr(kind, "__name__", str(kind))))


def _read(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_union(typing.get_args(kind), data, where)
    if origin in (tuple, list):
        return _read_sequence(kind, origin, data, where)
    if origin in (dict, collections.abc.Mapping) or kind in (dict, collections.abc.Mapping):
        return _read_mapping(kind, data, where)
    return _read_plain(kind, data, where)


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), "an object", data, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - set(fields)):
        raise errors.UsageError(f"{where} has no field {unknown[0]!r}; allowed: {', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise errors.UsageError(f"{where} lacks the field {name!r}; got: {', '.join(sorted(data)) or 'none'}")
    hints = _hints(kind)
    return kind(**{name: _read(hints[name], item, f"{where}.{name}") for name, item in data.items()})


def _read_union(members: tuple[Any, ...], data: Any, where: str) -> Any:
    for member in members:
        try:
            return _read(member, data, where)
        except errors.UsageError as error:
            last = error
    raise last


def _read_sequence(kind: Any, origin: type, data: Any, where: str) -> Any:
    _expect(isinstance(data, list), "a list", data, where)
    members = typing.get_args(kind)
    if origin is tuple and members[-1] is not Ellipsis:
        _expect(len(data) == len(members), f"a list of {len(members)}", data, where)
    else:
        members = (members[0],) * len(data)
    return origin(_read(member, item, f"{where}[{i}]") for i, (member, item) in enumerate(zip(members, data)))


def _read_mapping(kind: Any, data: Any, where: str) -> dict[str, Any]:
    _expect(isinstance(data, dict), "an object", data, where)
    _, member = typing.get_args(kind) or (str, Any)
    return {key: _read(member, item, f"{where}[{key!r}]") for key, item in data.items()}


def _read_plain(kind: Any, data: Any, where: str) -> Any:
    if kind is Path:
        _expect(isinstance(data, str), "a path", data, where)
        return Path(data)
    if kind is float:
        if isinstance(data, str) and data in _NOT_FINITE:
            return _NOT_FINITE[data]
        _expect(isinstance(data, int | float) and not isinstance(data, bool), "a number", data, where)
        return float(data)
    if kind is type(None):
        _expect(data is None, "null", data, where)
        return None
    if kind not in (str, int, bool):
        raise errors.UsageError(f"{where}: values of type {kind} cannot be read from JSON")
    _expect(isinstance(data, kind) and (kind is bool or not isinstance(data, bool)), kind.__name__, data, where)
    return data


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _not_finite_name(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _expect(holds: bool, allowed: str, got: Any, where: str) -> None:
    if not holds:
        raise errors.UsageError(f"{where} must be {allowed}, got {str(got)[:80]!r}")
