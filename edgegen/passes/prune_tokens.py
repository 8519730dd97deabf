"""Merge or drop a fixed share of a vision transformer's tokens at a few blocks; shapes stay static.

Bolya et al., 2023, Token Merging (ToMe), arXiv:2210.09461; Liang et al., 2022, EViT, arXiv:2202.07800 (dropping by the
attention of the class token). Deviations: few blocks instead of all, so that the shapes are few; prefix tokens never
merge; the mean of the heads' keys is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgegen import graph
from edgegen.nn import attention, tokens
from edgegen.passes import _attention
from edgegen.types import Job, Model, PassResult

# Option sets that `edgegen probe` times before any training.
PROBES = ({"ratio": 0.1}, {"ratio": 0.25}, {"ratio": 0.5})
_OTHER = "is not behind a block at which tokens leave"


def prune_tokens(
    model: Model,
    job: Job,
    *,
    ratio: float = 0.25,
    method: str = "merge",
    stages: Sequence[int] = (),
    by: str = "class",
    proportional: bool = True,
) -> PassResult:
    """Take a `ratio` of the tokens out at each of the `stages`, between the attention and the MLP of that block.

    Args:
        model: one stage with a module that holds timm's VisionTransformer blocks (or ones that compute the same).
        ratio: fraction of the tokens that leave at each stage, in (0, 1), for "merge" at most 0.5.
        method: "merge" (pairs of similar tokens become their mean) or "drop" (the least important ones leave).
        stages: blocks, from 0; none: after a quarter, a half and three quarters of the depth.
        by: what is important for "drop": "class" (attention of the class token) or "norm" (of the token).
        proportional: merged tokens count as many in later attentions (one addition to the logits).
    Returns:
        PassResult; `notes` has the tokens in each block. Works without training; a short distillation helps.
    Raises:
        ValueError: an option out of range, a stage that is no block, a model without a network.
    """
    module = _attention.network(model, "prune_tokens")
    _check(ratio, method, by)
    inputs = graph.example_inputs(model.stage, seed=job.seed, preprocessing=model.preprocessing)
    result = graph.clone(module).eval()
    skipped: dict[str, str] = {}
    changed: dict[str, str] = {}
    counts: dict[str, list[int]] = {}
    for path, blocks in _sequences(result).items():
        why = _unfit(result, path, blocks, inputs, method, by, proportional)
        if why:
            skipped |= {f"{path}.{name}": why for name, _ in blocks.named_children()}
            continue
        shape = _given(result, path, inputs)
        prefix = shape[1] - _grid(result, shape[1])
        cuts, counts[path] = _cuts(len(blocks), shape[1], prefix, ratio, method, list(stages), path)
        _attention.put(result, path, tokens.TokenStages(blocks, cuts, prefix, method, by, proportional))
        if why := _broken(module, result, inputs) if cuts else f"a ratio of {ratio} of so few tokens is none":
            _attention.put(result, path, blocks)
            skipped |= {f"{path}.{name}": why for name, _ in blocks.named_children()}
            continue
        changed |= _told(path, counts[path], shape[1])
    after = graph.cost(result, inputs)
    before = graph.cost(module, inputs)
    notes = {"tokens": counts, "macs_before": before.macs, "macs_after": after.macs, "method": method}
    other = _OTHER if changed else _windows(module)
    changed, skipped = _attention.account(module, changed, skipped, other)
    return PassResult(model.with_module(result), changed, skipped, notes, bool(changed))


def _check(ratio: float, method: str, by: str) -> None:
    if method not in tokens.METHODS:
        raise ValueError(f"method must be one of {', '.join(tokens.METHODS)}, got {method!r}")
    if by not in tokens.SCORES:
        raise ValueError(f"by must be one of {', '.join(tokens.SCORES)}, got {by!r}")
    limit = 0.5 if method == "merge" else 1.0
    if not 0 < ratio < 1 or ratio > limit:
        raise ValueError(f"ratio must lie in (0, {'0.5]' if method == 'merge' else '1)'} for {method}, got {ratio}")


def _sequences(module: nn.Module) -> dict[str, nn.Sequential]:
    """Chains of two or more transformer blocks."""
    return {
        path: part for path, part in module.named_modules()
        if path and isinstance(part, nn.Sequential) and sum(tokens.has_parts(block) for block in part) > 1
    }  # fmt: skip


def _windows(module: nn.Module) -> str:
    """Why nothing applies to the network as a whole."""
    if any("window" in type(part).__name__.lower() for part in module.modules()):
        return "attention in windows needs the grid of tokens, which merging and dropping take away"
    return "is in no vision transformer of timm's form (blocks with norm1, attn, norm2, mlp)"


def _given(module: nn.Module, path: str, inputs: Sequence[torch.Tensor]) -> torch.Size:
    """Shape of what a module is given."""
    seen: list[torch.Tensor] = []
    handle = module.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        graph.outputs(module, inputs)
    finally:
        handle.remove()
    return seen[0].shape


def _grid(module: nn.Module, count: int) -> int:
    """How many of the tokens are patches; the others stand in front."""
    prefix = getattr(module, "num_prefix_tokens", None)
    if isinstance(prefix, int):
        return count - prefix
    for part in module.modules():
        size = getattr(part, "grid_size", None)
        if isinstance(size, tuple | list) and len(size) == 2 and 0 <= count - size[0] * size[1] <= 16:
            return int(size[0] * size[1])
    return count - 1  # a class token, as in the original


def _unfit(
    module: nn.Module, path: str, blocks: nn.Sequential, inputs: Sequence[torch.Tensor], method: str, by: str,
    proportional: bool,
) -> str:  # fmt: skip
    """Why tokens cannot leave between these blocks, or "". Each block is recomputed and compared with what it gave."""
    if isinstance(blocks, tokens.TokenStages):
        return "tokens already leave here"
    seen: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
    handles = [
        block.register_forward_hook(lambda part, args, out: seen.append((part, args[0], out)))
        for block in blocks if tokens.has_parts(block)
    ]  # fmt: skip
    with graph.hooked(handles):
        graph.outputs(module, inputs)
    if any(x.ndim != 3 for _, x, _ in seen):
        return _windows(module) if "window" in _windows(module) else "works on a grid, not on a sequence of tokens"
    for block, x, out in seen:
        if isinstance(block.attn, attention.DownsampledAttention | attention.WindowAttention):
            return "its attention needs the grid of tokens"
        try:
            with torch.no_grad():
                sizes = torch.ones_like(x[..., :1]) if proportional and method == "merge" else None
                again = tokens.fed_forward(block, tokens.attended(block, x, sizes)[0])
                if method == "drop" and by == "class":
                    tokens.class_attention(block.attn, x)
        except (TypeError, ValueError, RuntimeError) as error:
            return f"cannot take part: {str(error).splitlines()[0]}"
        if not torch.allclose(again, out, rtol=1e-4, atol=1e-4 * float(out.abs().max())):
            return "computes something else than x + attn(norm1(x)), x + mlp(norm2(x))"
    if method == "drop" and by == "class" and _grid(module, seen[0][1].shape[1]) == seen[0][1].shape[1]:
        return "there is no class token; use by = \"norm\""
    return ""


def _cuts(
    depth: int, count: int, prefix: int, ratio: float, method: str, stages: list[int], path: str
) -> tuple[list[list[int]], list[int]]:
    """([[block, how many leave]], tokens in the MLP of each block).

    Raises:
        ValueError: a stage that is no block.
    """
    chosen = sorted(set(stages)) or sorted({depth // 4, depth // 2, depth * 3 // 4})
    if wrong := [stage for stage in chosen if not 0 <= stage < depth]:
        raise ValueError(f"stages must lie in 0..{depth - 1}, as {path} has {depth} blocks, got {wrong[0]}")
    left, cuts, counts = count - prefix, [], []
    for block in range(depth):
        if block in chosen:
            most = (left + 1) // 2 if method == "merge" else left - 1
            gone = min(round(left * ratio), most)
            if gone:
                cuts.append([block, gone])
            left -= gone
        counts.append(left + prefix)
    return cuts, counts


def _broken(before: nn.Module, after: nn.Module, inputs: Sequence[torch.Tensor]) -> str:
    """Why the network does not stand fewer tokens, or ""."""
    try:
        got = graph.outputs(after, inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"what follows needs all tokens: {str(error).splitlines()[0]}"
    if [x.shape for x in got] != [x.shape for x in graph.outputs(before, inputs)]:
        return "the network's output has one entry a token"
    return "" if all(torch.isfinite(x).all() for x in got) else "outputs are not finite"


def _told(path: str, counts: list[int], given: int) -> dict[str, str]:
    """Block -> the tokens that it works on, for every block that sees fewer than the chain is given."""
    return {f"{path}.{index}": f"{count} of {given} tokens behind its attention"
            for index, count in enumerate(counts) if count < given}  # fmt: skip
