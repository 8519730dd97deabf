"""Describe how a compressed network differs from its original, as JSON, and rebuild it from a fresh original.

So a pruned network reloads without pickle and without the code that pruned it: `rebuild(create(), description)` has the
pruned shapes and attributes, and `weights.load_into` then fits exactly. Told are parameter and buffer shapes, plain
attributes of any module (channel counts, heads, normalised shapes), modules replaced by `Identity` and modules removed,
and the blocks of `edgegen.nn` that stand in the place of others (see `blocks`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgegen import blocks, weights
from edgegen.errors import ModelError

SCHEMA = 1
_PRIVATE = frozenset(nn.Module().__dict__) | {"training"}
_MAX_ELEMENTS = 2**33
_MAX_VALUES = 65536  # non-persistent buffers are told by value up to this size


def describe(module: nn.Module, original: nn.Module) -> dict[str, Any]:
    """The differences of `module` from `original`, as JSON values.

    Returns:
        {"schema": 1, "blocks": [see `blocks.describe`], "removed": [path], "replaced": {path: class it had}, "modules":
        {path: {"class", "attributes", "tensors": {name: {"shape", "was", "dtype"}}, "values"}}, "shapes": hash of all
        names and shapes}.
    Raises:
        ModelError: a difference that this form cannot tell, such as a module of another class.
    """
    base = copy.deepcopy(original)
    made = blocks.describe(module, base)
    old, new = dict(base.named_modules(remove_duplicate=False)), dict(module.named_modules(remove_duplicate=False))
    replaced = {path: _class(old[path]) for path in new if path in old and _became_identity(new[path], old[path])}
    inside = tuple(f"{path}." for path in replaced)
    removed = [path for path in old if path not in new and not (inside and path.startswith(inside))]
    removed = [path for path in removed if not any(path.startswith(f"{other}.") for other in removed)]
    modules, told = {}, set()
    for path, part in new.items():
        if path in replaced or id(part) in told:  # a shared module is told at its first path
            continue
        told.add(id(part))
        if path not in old or _class(part) != _class(old[path]):
            was = f"was {_class(old[path])}" if path in old else "is not in the original"
            raise ModelError(f"cannot describe {path or 'the network'}: it is a {_class(part)} and {was}")
        if change := _differences(part, old[path], path):
            modules[path] = {"class": _class(part), **change}
    return {"schema": SCHEMA, "blocks": made, "removed": removed, "replaced": replaced, "modules": modules,
            "shapes": _shapes(module)}  # fmt: skip


def rebuild(fresh: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Give a freshly made original the described shapes and attributes; its new tensors are zeros.

    Args:
        fresh: changed in place and returned.
    Raises:
        ModelError: the description is malformed or does not fit `fresh`.
    """
    if description.get("schema") != SCHEMA:
        raise ModelError(f"architecture description has schema {description.get('schema')!r}, known is {SCHEMA}")
    try:
        blocks.apply(fresh, description.get("blocks", ()))
        for path in description["removed"]:
            _remove(fresh, path)
        for path, kind in description["replaced"].items():
            _check_class(_find(fresh, path), kind, path)
            _put(fresh, path, nn.Identity().train(fresh.training))
        parts = {path: _find(fresh, path) for path in description["modules"]}
        tied: dict[tuple[Any, ...], torch.Tensor] = {}
        for path, change in description["modules"].items():
            _check_class(parts[path], change["class"], path)
            _apply(parts[path], change, path, tied)
        fits = _shapes(fresh) == description["shapes"]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"architecture description is malformed: {type(error).__name__} {error}") from error
    if not fits:
        raise ModelError("architecture description does not fit this network: other tensors or shapes are left over")
    return fresh


def identity(module: nn.Module) -> str:
    """SHA-256 over all that decides about a network's output: weights, classes, plain attributes, code of a traced one.

    Blocks that drop tokens or shrink attention's keys have no tensors of their own: equal weights are not one network.
    """
    digest = hashlib.sha256(weights.state_hash(module).encode())
    for path, part in module.named_modules(remove_duplicate=False):
        plain = {name: _encode(value) for name, value in part.__dict__.items()
                 if name not in _PRIVATE and _is_plain(value)}  # fmt: skip
        code = part.code if isinstance(part, torch.fx.GraphModule) else ""
        digest.update(json.dumps([path, _class(part), plain, code], sort_keys=True).encode())
        for name in sorted(part._non_persistent_buffers_set):
            if (value := part._buffers[name]) is not None:
                digest.update(f"{name} {_form(value)}".encode() + value.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _became_identity(new: nn.Module, old: nn.Module) -> bool:
    return isinstance(new, nn.Identity) and not isinstance(old, nn.Identity)


def _shapes(module: nn.Module) -> str:
    """A hash over the names, shapes and dtypes of parameters and persistent buffers.

    Not over `state_dict()`: a module may leave out there what still has its first value.
    """
    state = {
        f"{path}.{name}" if path else name: tensor
        for path, part in module.named_modules(remove_duplicate=False)
        for name, tensor in _own_tensors(part).items()
        if tensor is not None and name not in part._non_persistent_buffers_set
    }
    text = "\n".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(state.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _differences(new: nn.Module, old: nn.Module, path: str) -> dict[str, Any]:
    """What differs in the module itself, not in its children; empty when nothing does."""
    change: dict[str, Any] = {}
    if attributes := _attributes(new, old, path):
        change["attributes"] = attributes
    tensors, values = {}, {}
    before, after = _own_tensors(old), _own_tensors(new)
    for name in after.keys() | before.keys():
        is_, was = after.get(name), before.get(name)
        if name in new._non_persistent_buffers_set and is_ is not None:
            if was is None or is_.shape != was.shape or not torch.equal(is_.cpu(), was.cpu()):
                values[name] = _encode_values(is_, f"{path}.{name}")
        elif _form(is_) != _form(was):
            tensors[name] = {"shape": _shape(is_), "was": _shape(was), "dtype": _dtype(is_)}
    if tensors:
        change["tensors"] = dict(sorted(tensors.items()))
    if values:
        change["values"] = dict(sorted(values.items()))
    return change


def _attributes(new: nn.Module, old: nn.Module, path: str) -> dict[str, Any]:
    """Plain attributes with another value, encoded."""
    changed = {}
    for name, value in new.__dict__.items():
        if name in _PRIVATE:
            continue
        was = old.__dict__.get(name)
        if isinstance(value, torch.Tensor) and isinstance(was, torch.Tensor) and value.shape != was.shape:
            raise ModelError(f"cannot describe {path}.{name}: a tensor that is neither parameter nor buffer changed")
        if _is_plain(value) and (name not in old.__dict__ or value != was):
            changed[name] = _encode(value)
    return dict(sorted(changed.items()))


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {**module._parameters, **module._buffers}


def _shape(tensor: torch.Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def _dtype(tensor: torch.Tensor | None) -> str:
    return "" if tensor is None else str(tensor.dtype).removeprefix("torch.")


def _form(tensor: torch.Tensor | None) -> tuple[Any, ...]:
    return _shape(tensor), _dtype(tensor)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _encode(value: Any) -> Any:
    """JSON in which tuples and sizes stay apart from lists."""
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "dict":
            return {key: _decode(item) for key, item in content.items()}
        return {"tuple": tuple, "size": torch.Size}[kind]([_decode(item) for item in content])
    return value


def _encode_values(tensor: torch.Tensor, name: str) -> dict[str, Any]:
    if tensor.numel() > _MAX_VALUES or not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"cannot describe {name}: a changed buffer outside the state, too large or not finite")
    return {"dtype": _dtype(tensor), "shape": _shape(tensor), "values": tensor.flatten().tolist()}


def _find(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f"architecture description does not fit this network: it has no module {path!r}") from error


def _split(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    _find(root, path)
    return _find(root, parent), name


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, name = _split(root, path)
    parent._modules[name] = module


def _remove(root: nn.Module, path: str) -> None:
    parent, name = _split(root, path)
    del parent._modules[name]


def _check_class(part: nn.Module, kind: str, path: str) -> None:
    if _class(part) != kind:
        found = f"{path} is a {_class(part)}, not a {kind}"
        raise ModelError(f"architecture description does not fit this network: {found}")


def _apply(part: nn.Module, change: Mapping[str, Any], path: str, tied: dict[tuple[Any, ...], torch.Tensor]) -> None:
    """Set the attributes and tensors of one module; tensors that were one stay one."""
    for name, value in change.get("attributes", {}).items():
        if name in _PRIVATE or name.startswith("__") or not _is_plain(getattr(part, name, None)):
            raise ModelError(f"architecture description sets {path}.{name}, which is not a plain attribute")
        part.__dict__[name] = _decode(value)  # not setattr: a class may compute other things when it is set
    own = _own_tensors(part)
    for name, form in change.get("tensors", {}).items():
        if _shape(own.get(name)) != form["was"]:
            raise ModelError(
                f"architecture description does not fit this network: {path}.{name} has shape {_shape(own.get(name))}, "
                f"the description expects {form['was']}"
            )
        if form["shape"] is not None and name not in own:
            raise ModelError(f"architecture description adds {path}.{name}, which the class does not have")
        _set_tensor(part, name, form, tied)
    for name, form in change.get("values", {}).items():
        values = torch.tensor(form["values"], dtype=_torch_dtype(form["dtype"])).reshape(form["shape"])
        part.register_buffer(name, values, persistent=False)


def _set_tensor(part: nn.Module, name: str, form: Mapping[str, Any], tied: dict[tuple[Any, ...], torch.Tensor]) -> None:
    holder: dict[str, Any] = part._parameters if name in part._parameters else part._buffers
    if form["shape"] is None:
        if name in holder:
            holder[name] = None
        return
    shape, old = form["shape"], holder[name]
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) > _MAX_ELEMENTS:
        raise ModelError(f"architecture description gives {name} the impossible shape {shape}")
    key = (id(old), tuple(shape)) if old is not None else (id(part), name)
    if key not in tied:
        fresh = torch.zeros(shape, dtype=_torch_dtype(form["dtype"]))
        needs_grad = bool(old.requires_grad) if old is not None else True
        tied[key] = nn.Parameter(fresh, requires_grad=needs_grad) if holder is part._parameters else fresh
    holder[name] = tied[key]


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"architecture description names the unknown dtype {name!r}")
    return dtype
