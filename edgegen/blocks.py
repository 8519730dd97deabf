"""Blocks of `edgegen.nn` that stand in the place of a network's own modules, and modules that share their weights.

A block is a module of a class in `edgegen.nn` with a plain attribute `config` (JSON values: lists, not tuples):
`Class(**config)` makes the same block with fresh weights. A class with `WRAPS = True` keeps the module that it replaces
as its child `inner`, and is made by `Class(inner, **config)`. So a network with blocks is told as JSON and made again
without the pass that put them there.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from edgegen.errors import ModelError

_HOME = "edgegen.nn."


def is_block(module: nn.Module) -> bool:
    """Whether the module can tell how to make it again."""
    return type(module).__module__.startswith(_HOME) and isinstance(module.__dict__.get("config"), dict)


def describe(module: nn.Module, base: nn.Module) -> list[dict[str, Any]]:
    """The blocks and shared modules of `module` in the order of their making; `base` is given them, in place.

    Returns:
        [{"path", "was": class, "block": "edgegen.nn.<file>.<Class>", "config"} or {"path", "was", "same_as": path}].
    """
    found: list[dict[str, Any]] = []
    while (entry := _next(module, base)) is not None:
        apply(base, [entry])
        found.append(entry)
    return found


def _next(module: nn.Module, base: nn.Module) -> dict[str, Any] | None:
    """The first difference of this kind, outer modules before inner ones."""
    old = dict(base.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        other = first.setdefault(id(part), path)
        if not path or path not in old:
            continue
        was = type(old[path]).__name__
        if other != path:
            if other in old and old[path] is not old[other]:
                return {"path": path, "was": was, "same_as": other}
        elif is_block(part) and not (type(old[path]) is type(part) and old[path].__dict__.get("config") == part.config):
            name = f"{type(part).__module__}.{type(part).__qualname__}"
            return {"path": path, "was": was, "block": name, "config": part.config}
    return None


def apply(root: nn.Module, entries: Iterable[Mapping[str, Any]]) -> None:
    """Put freshly made blocks and shared modules into `root`.

    Raises:
        ModelError: an entry that does not fit `root`, or names no block of edgegen.
    """
    for entry in entries:
        path = entry["path"]
        try:
            old, (parent, name) = root.get_submodule(path), _split(root, path)
            shared = root.get_submodule(entry["same_as"]) if "same_as" in entry else None
        except AttributeError as error:
            raise ModelError(f"architecture description does not fit this network: {error}") from error
        if type(old).__name__ != entry["was"]:
            raise ModelError(f"architecture description does not fit this network: {path} is a {type(old).__name__}, "
                             f"not a {entry['was']}")  # fmt: skip
        parent._modules[name] = shared if shared is not None else make(entry["block"], entry["config"], old)


def make(name: str, config: Mapping[str, Any], inner: nn.Module) -> nn.Module:
    """A fresh block of the class `name`, in the mode of the module that it replaces.

    Raises:
        ModelError: not a block of edgegen, or a configuration that it does not take.
    """
    home, _, kind = name.rpartition(".")
    if not home.startswith(_HOME) or not all(part.isidentifier() for part in name.split(".")):
        raise ModelError(f"architecture description names {name!r}, which is no block of edgegen")
    try:
        cls = getattr(importlib.import_module(home), kind, None)
    except ImportError:
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ModelError(f"architecture description names {name!r}, which this version of edgegen does not have")
    try:
        block: nn.Module = cls(inner, **config) if getattr(cls, "WRAPS", False) else cls(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"architecture description gives {name} a wrong configuration: {error}") from error
    if not is_block(block) or block.config != json.loads(json.dumps(config)):
        raise ModelError(f"architecture description names {name!r}, no block of edgegen with that configuration")
    return block.train(inner.training)


def _split(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return root.get_submodule(parent), name
