"""Published layouts of style-based generators under the names of this folder, their gains moved into the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgegen.nn import modulated

Rename = tuple[str, str]


def renamed(state: Mapping[str, Tensor], rules: tuple[Rename, ...], drop: str = "") -> dict[str, Tensor]:
    """Each name by the first rule (pattern, replacement) that matches all of it; names matching `drop` are left out."""
    result = {}
    for name, tensor in state.items():
        if drop and re.fullmatch(drop, name):
            continue
        for pattern, to in rules:
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, to, name)
                break
        result[name] = tensor
    return result


def fold_spectral_norm(state: Mapping[str, Tensor], transposed: str = "") -> dict[str, Tensor]:
    """weight_orig, weight_u and weight_v of torch's spectral norm as weight = weight_orig / (u W v).

    transposed: pattern of the layers that are transposed convolutions, which are normalised along their outputs.
    """
    result = {}
    for name, tensor in state.items():
        stem = re.sub(r"weight(_orig|_u|_v)$", "weight", name)
        if stem == name or not all(stem + part in state for part in ("_orig", "_u", "_v")):
            result[name] = tensor
        elif name.endswith("_orig"):
            axis = 1 if transposed and re.fullmatch(transposed, stem.removesuffix(".weight")) else 0
            matrix = tensor.movedim(axis, 0).flatten(1).float()
            result[stem] = tensor / (state[stem + "_u"].float() @ matrix @ state[stem + "_v"].float())
    return result


def stylegan2(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """rosinality or NVIDIA names to those of models/stylegan2.py; other names come back as they are."""
    if any(name.startswith(("convs.", "to_rgb1.", "style.")) for name in state):
        state = _nvidia_names(state)
    if any(re.search(r"(^|\.)(torgb|fc\d+)\.", name) for name in state):
        parts = [baked(name, tensor, config.get("noise", "constant")) for name, tensor in state.items()
                 if not name.endswith("resample_filter")]  # fmt: skip
        state = {name: tensor for part in parts for name, tensor in part.items()}
    result = dict(state)
    if config.get("truncation", 1.0) == 1.0:
        result.pop("mapping.average", None)
    elif "mapping.average" not in result and "mapping.fc.0.weight" in result:
        result["mapping.average"] = mean_style(result)
    prefix = f"{config.get('part', 'all')}."
    inside = {name.removeprefix(prefix): tensor for name, tensor in result.items() if name.startswith(prefix)}
    return inside or result


def mean_style(state: Mapping[str, Tensor], count: int = 4096) -> Tensor:
    """The mean of w over `count` seeded latents, for checkpoints without it (rosinality's scripts do the same)."""
    parts = {n.removeprefix("mapping."): t.float() for n, t in state.items() if n.startswith("mapping.fc.")}
    depth, latent = len(parts) // 2, parts["fc.0.weight"].shape[1]
    network = modulated.Mapping(latent, parts["fc.0.weight"].shape[0], depth)
    network.load_state_dict(parts)
    with torch.no_grad():
        return network(torch.randn(count, latent, generator=torch.Generator().manual_seed(0))).mean(0)


def _nvidia_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """rosinality's names and shapes as NVIDIA's."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".kernel"):
            continue
        if match := re.fullmatch(r"style\.(\d+)\.(weight|bias)", name):
            result[f"mapping.fc{int(match[1]) - 1}.{match[2]}"] = tensor
        elif name == "input.input":
            result["synthesis.b4.const"] = tensor[0]
        elif name == "latent_avg":
            result["mapping.w_avg"] = tensor.reshape(-1)
        elif match := re.fullmatch(r"noises\.noise_(\d+)", name):
            result[f"synthesis.{_place(int(match[1]) - 1)}.noise_const"] = tensor[0, 0]
        elif match := re.fullmatch(r"(conv1|convs\.(\d+)|to_rgb1|to_rgbs\.(\d+))\.(.+)", name):
            if match[1].startswith("to_rgb"):
                place = f"b{4 if match[3] is None else 2 ** (int(match[3]) + 3)}.torgb"
            else:
                place = _place(-1 if match[2] is None else int(match[2]))
            result[f"synthesis.{place}.{_inside(match[4])}"] = _shaped(match[4], tensor)
        else:
            result[name] = tensor
    return result


def _place(index: int) -> str:
    """Block and layer of rosinality's convs.<index>; -1 is conv1."""
    return "b4.conv1" if index < 0 else f"b{2 ** (index // 2 + 3)}.conv{index % 2}"


def _inside(name: str) -> str:
    known = {"conv.weight": "weight", "conv.modulation.weight": "affine.weight", "conv.modulation.bias": "affine.bias",
             "noise.weight": "noise_strength", "activate.bias": "bias", "bias": "bias"}  # fmt: skip
    return known.get(name, name)


def _shaped(name: str, tensor: Tensor) -> Tensor:
    if name == "conv.weight":
        return tensor[0]
    return tensor.reshape(()) if name == "noise.weight" else tensor.reshape(-1) if name == "bias" else tensor


def baked(name: str, tensor: Tensor, noise: str) -> dict[str, Tensor]:
    """One tensor of NVIDIA's layout as the tensors of ours, with the gains that its layer applies."""
    root = math.sqrt(2)
    if match := re.fullmatch(r"mapping\.fc(\d+)\.(weight|bias)", name):
        gain = 0.01 * root / (math.sqrt(tensor.shape[1]) if tensor.ndim == 2 else 1)  # 0.01: learning rate multiplier
        return {f"mapping.fc.{match[1]}.{match[2]}": tensor * gain}
    if name == "mapping.w_avg":
        return {"mapping.average": tensor}
    if name == "synthesis.b4.const":
        return {name: tensor[None]}
    match = re.fullmatch(r"(synthesis\.b\d+)\.(conv0|conv1|torgb)\.(.+)", name)
    if match is None:
        return {name: tensor}
    block, layer, inside = match.groups()
    stem = f"{block}.{'to_rgb' if layer == 'torgb' else layer}"
    if inside == "affine.weight":
        return {f"{stem}.{inside}": tensor / math.sqrt(tensor.shape[1])}
    if inside == "weight":
        weight = tensor / math.sqrt(tensor[0].numel())
        return {f"{stem}.conv.weight": weight.transpose(0, 1) if layer == "conv0" else weight}
    if inside == "bias":
        return {f"{stem}.conv.bias": tensor} if layer == "torgb" else {f"{stem}.bias": tensor * root}
    if inside == "noise_const":
        return {f"{stem}.noise": tensor[None, None]} if noise == "constant" else {}
    if inside == "noise_strength":
        return {f"{stem}.strength": tensor * root} if noise != "none" else {}
    return {f"{stem}.{inside}": tensor}
