"""Make an unchanged architecture again from its `origin`: a built-in name, a timm name, or a user's file and factory.

A model given as Python code is code that the user chose to run: it runs in this process, with the user's rights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgegen import files, registry
from edgegen.errors import MissingExtra, ModelError

if TYPE_CHECKING:
    from torch import nn


def create(origin: Mapping[str, Any], folder: Path | None = None) -> nn.Module:
    """A fresh network of the original architecture, with whatever weights its factory gives it.

    Args:
        origin: as in `types.Model.origin`; kind "builtin", "timm" or "file".
        folder: what a relative path of kind "file" is relative to.
    Raises:
        ModelError: unknown name or kind, missing file, or a factory that fails. MissingExtra: no torch or timm.
    """
    require("torch")
    kind, config = origin.get("kind"), dict(origin.get("config") or {})
    if kind == "builtin":
        source = f"built-in model {origin['name']}"
        return call(registry.module("models", origin["name"]).create, config, source)
    if kind == "timm":
        timm = require("timm")
        name = check_timm(origin["name"])
        config = {"pretrained": False, "exportable": True, **config}
        return call(lambda **options: timm.create_model(name, **options), config, f"timm:{name}")
    if kind == "file":
        path = (folder or Path()) / origin["path"]
        if origin.get("sha256") and path.is_file() and files.sha256(path) != origin["sha256"]:
            raise ModelError(f"{path} has changed since the model was loaded from it")
        return call(factory(path, origin["factory"]), config, f"{path}:{origin['factory']}")
    raise ModelError(f"a model of kind {kind!r} has no torch architecture to make again; it allows post-training only")


def require(package: str) -> ModuleType:
    """Import an optional package, or say how to install it."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(package, "to load this model", "timm" if package == "timm" else "torch")
    return importlib.import_module(package)


def check_timm(name: str) -> str:
    """The name, if timm has it.

    Raises:
        ModelError: unknown; gives the near match.
    """
    timm = require("timm")
    if not timm.is_model(name):
        known = timm.list_models()
        raise ModelError(f"unknown timm model {name!r}{registry.near(name, known)}; timm has {len(known)} models")
    return name


def code(path: Path) -> ModuleType:
    """Run a user's Python file under a private module name, once for each content.

    The file's folder is on the import path meanwhile, as it would be for `python file.py`.

    Raises:
        ModelError: no such file, or an error inside it.
    """
    if not path.is_file():
        raise ModelError(f"model file {path}: no such file")
    content = path.read_bytes()
    name = f"_edgegen_model_{files.key(str(path.resolve()), hashlib.sha256(content).hexdigest())}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        # Not the import system: that would leave a __pycache__ behind, or run one that somebody left.
        exec(compile(content, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelError(f"model file {path}: {describe(error)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def factory(path: Path, name: str) -> Any:
    """The function `name` of a user's file.

    Raises:
        ModelError: the file has no such function; lists what it has.
    """
    module = code(path)
    found = getattr(module, name, None)
    if callable(found):
        return found
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
           and getattr(value, "__module__", "") == module.__name__]  # fmt: skip
    raise ModelError(
        f"{path} has no factory {name!r}{registry.near(name, own)}; it has: {', '.join(own[:12]) or 'no functions'}"
    )


def call(function: Any, config: Mapping[str, Any], source: str) -> nn.Module:
    """Call a factory and check that a network comes back."""
    from torch import nn

    try:
        module = function(**config)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{source} failed: {describe(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{source} must return a torch nn.Module, got {type(module).__name__}")
    return module


def describe(error: BaseException) -> str:
    """An error of foreign code as one line: its type, its first line, and where it was raised."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {text}{where}"
