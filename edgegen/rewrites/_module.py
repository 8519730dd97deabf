"""What the rewrites of torch modules share: parametrizations and old-style hooks taken out, their result kept."""

from __future__ import annotations

from typing import Any

from edgegen.onnx_parity import evaluating


def fold(module: Any, *, parametrization: str, hook: str, what: str) -> dict[str, str]:
    """Make plain parameters of what a norm computes in eval mode.

    Args:
        parametrization, hook: class names in torch of the two forms of the norm.
    Returns:
        `<layer>.<weight>` -> what was done; weights with other parametrizations as well are left.
    """
    changed = {}
    with evaluating(module):
        for path, layer in module.named_modules():
            for name in _parametrized(layer, parametrization):
                changed[f"{path}.{name}".lstrip(".")] = f"{what} folded"
            for name in _hooked(layer, hook):
                changed[f"{path}.{name}".lstrip(".")] = f"{what} folded"
    return changed


def _parametrized(layer: Any, kind: str) -> list[str]:
    """Take out the parametrizations of a kind, when a layer has no others; the names of their weights.

    Not by torch's `remove_parametrizations`: it deletes from the layer's class, which a deep copy shares, so that the
    layer that the copy was made of has no weight any more.
    """
    import torch
    from torch.nn.utils import parametrize

    found = getattr(layer, "parametrizations", None) or {}
    if not found or any([type(part).__name__ for part in parts] != [kind] for parts in found.values()):
        return []
    with torch.no_grad():
        values = {name: getattr(layer, name).detach().clone() for name in found}
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    for name, value in values.items():
        layer.register_parameter(name, torch.nn.Parameter(value))
    return list(values)


def _hooked(layer: Any, kind: str) -> list[str]:
    """Take out the hooks of a kind; the names of their weights."""
    import torch

    names = []
    for key, one in list(layer._forward_pre_hooks.items()):
        if type(one).__name__ == kind and hasattr(one, "remove"):
            with torch.no_grad():
                one.remove(layer)
            del layer._forward_pre_hooks[key]
            names.append(one.name)
    for key, one in list(layer._state_dict_hooks.items()):
        if type(one).__name__ == f"{kind}StateDictHook":
            del layer._state_dict_hooks[key]
    for key, one in list(layer._load_state_dict_pre_hooks.items()):
        if type(getattr(one, "hook", one)).__name__ == f"{kind}LoadStateDictPreHook":
            del layer._load_state_dict_pre_hooks[key]
    return names
