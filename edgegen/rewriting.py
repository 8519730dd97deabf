"""Applying exact rewrites by name: as offers that have to be timed, and as cures for what a runtime cannot take.

A rewrite is a file of edgegen/rewrites/ named as its function. It changes an ONNX model in place (`<name>`), a torch
program (`program_<name>`, on the network of an ExportedProgram) or a torch module (`module_<name>`), and returns what
it rewrote, layer by layer; nothing is rewritten where it would not be exact.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgegen import errors, onnx_files, onnx_graph, program, registry
from edgegen.types import Artifact, Graph, Problem, Stage, Target

KIND = "rewrites"
OFFERS = (
    "static_modulated_convolution", "merge_adalin", "fuse_instance_norm", "merge_upsampling", "block_output",
)  # fmt: skip
"""Tried on every network in this order, and kept where they are faster (see variants.py)."""
_LEVELS = {"onnx": "", "program": "program_", "module": "module_"}


@dataclass(frozen=True)
class Cured:
    """A graph that a runtime takes, what was rewritten (rewrite -> layer -> what), and what it still refuses."""

    graph: Graph
    changed: Mapping[str, Mapping[str, str]]
    problems: tuple[Problem, ...]


def function(name: str, level: str = "onnx") -> Callable[..., dict[str, str]] | None:
    """The function of a rewrite for "onnx", "program" or "module"; None where it has none."""
    return getattr(registry.module(KIND, name), f"{_LEVELS[level]}{name}", None)


def apply(target: Any, names: Iterable[str], level: str = "onnx") -> dict[str, dict[str, str]]:
    """Apply rewrites one after the other, in place; rewrite -> layer -> what, without those that found nothing.

    Raises:
        errors.UsageError: an unknown rewrite.
    """
    changed = {}
    for name in names:
        rewrite = function(name, level)
        if rewrite is not None and (found := rewrite(target)):
            changed[name] = found
    return changed


def cures_for(runtime: str, problems: Iterable[Problem]) -> tuple[str, ...]:
    """Rewrites that the problems name, those that remove an operation which they name, and the runtime's own cures.

    An operation may be told as "Resize", "upsample_bicubic2d" or "aten.upsample_bicubic2d.vec".
    """
    known = {name: registry.module(KIND, name) for name in registry.names(KIND)}
    texts = [problem.rewrite for problem in problems]
    told = {part for problem in problems for part in re.split(r"[.:/\s]+", problem.op)}
    named = [name for name in known if any(name in text for text in texts)]
    fitting = [name for name, module in known.items() if told & set(getattr(module, "REMOVES", ()))]
    own = [name for name, module in known.items() if runtime in module.RUNTIMES]
    return tuple(dict.fromkeys((*named, *fitting, *own)))


def cures(
    graph: Graph, runtime: str, target: Target, *, feeds: Mapping[str, np.ndarray], out: Path, tolerance: float = 1e-3
) -> Cured:
    """Rewrite a graph, or its torch program, until the runtime has nothing against it, or no cure changes anything.

    Args:
        feeds: a real sample an input; the rewritten graph must answer it as the given one does.
        out: the .onnx or .pt2 file to write; nothing is written when nothing is rewritten.
        tolerance: largest difference, as a fraction of the output's peak.
    Raises:
        errors.RuntimeFailed: the rewritten graph computes something else.
    """
    module = registry.module("runtimes", runtime)
    problems = tuple(module.supports(graph, target))
    wants_program = getattr(module, "NEEDS_PROGRAM", False)
    rewrite = rewritten_program if wants_program else rewritten
    changed: dict[str, dict[str, str]] = {}
    tried: set[str] = set()
    # Some runtimes tell one problem at a time, so there may be another one behind it.
    while problems and not (wants_program and graph.program is None):
        names = [name for name in cures_for(runtime, problems) if name not in tried]
        graph, found = rewrite(graph, names, out, feeds=feeds, tolerance=tolerance)
        if not found:
            break
        tried |= set(names)
        changed |= found
        problems = tuple(module.supports(graph, target))
    return Cured(graph, changed, problems)


def built(
    build: Callable[[Graph], Artifact], graph: Graph, runtime: str, target: Target, *,
    feeds: Mapping[str, np.ndarray], out: Path,
) -> tuple[Artifact, tuple[str, ...]]:  # fmt: skip
    """What `build` makes of the graph, and the rewrites that it took: none, unless the runtime refuses the graph.

    Raises:
        errors.Unsupported: no cure helps. errors.RuntimeFailed: the rewritten graph computes something else.
    """
    try:
        return build(graph), ()
    except errors.Unsupported:
        cured = cures(graph, runtime, target, feeds=feeds, out=out)
        if cured.problems or not cured.changed:
            raise
        return build(cured.graph), tuple(sorted(cured.changed))


def rewritten(
    graph: Graph, names: Iterable[str], out: Path, *, feeds: Mapping[str, np.ndarray], tolerance: float = 1e-3
) -> tuple[Graph, dict[str, dict[str, str]]]:
    """The graph with rewrites applied to its ONNX file, and what was rewritten; checked in ONNX Runtime on `feeds`.

    Raises:
        errors.RuntimeFailed: the rewritten graph computes something else.
    """
    content = onnx.load(graph.onnx)
    changed = apply(content, names)
    if not changed:
        return graph, {}
    sha256 = onnx_files.write(onnx_files.tidy(content), out)
    cost = onnx_graph.cost(out)
    made = dataclasses.replace(graph, onnx=out, sha256=sha256, macs=cost.macs, params=cost.params, program=None)
    before = Stage(graph.stage, None, graph.inputs, graph.outputs, graph.onnx)
    onnx_graph.parity(before, made, feeds, rtol=tolerance)
    return made, changed


def rewritten_program(
    graph: Graph, names: Iterable[str], out: Path, *, feeds: Mapping[str, np.ndarray], tolerance: float = 1e-3
) -> tuple[Graph, dict[str, dict[str, str]]]:
    """The graph with rewrites applied to its torch program; the ONNX file stays and is what the program is checked by.

    Raises:
        errors.ModelError: there is no program, or torch cannot export the rewritten one.
        errors.RuntimeFailed: the rewritten program computes something else.
    """
    if graph.program is None:
        raise errors.ModelError(f"{graph.stage}: has no torch program to rewrite")
    network = program.load(graph.program).module()
    changed = apply(network, names, "program")
    if not changed:
        return graph, {}
    stage = Stage(graph.stage, network, graph.inputs, graph.outputs)
    onnx_graph.parity(stage, graph, feeds, rtol=tolerance)
    return dataclasses.replace(graph, program=program.save(stage, out.with_suffix(".pt2"))), changed


def fold_module(module: Any) -> dict[str, dict[str, str]]:
    """Apply every rewrite of torch modules, in place: what parametrizations and hooks compute becomes plain weights."""
    return apply(module, registry.names(KIND), "module")
