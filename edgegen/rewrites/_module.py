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
                _plain_parametrized(layer, name)
                changed[f"{path}.{name}".lstrip(".")] = f"{what} folded"
            for name in _hooked(layer, hook):
                changed[f"{path}.{name}".lstrip(".")] = f"{what} folded"
    return changed


def _parametrized(layer: Any, kind: str) -> list[str]:
    found = getattr(layer, "parametrizations", None) or {}
    return [name for name, parts in found.items() if [type(part).__name__ for part in parts] == [kind]]


def _plain_parametrized(layer: Any, name: str) -> None:
    import torch
    from torch.nn.utils import parametrize

    with torch.no_grad():
        parametrize.remove_parametrizations(layer, name, leave_parametrized=True)


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
