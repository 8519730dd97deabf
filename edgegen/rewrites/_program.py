"""What every rewrite of a torch program needs. The network is `ExportedProgram.module()`, a graph of aten operations.

A rewritten operation becomes a call of a plain Python function; exporting the network again writes that function's own
operations in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

Applies = Callable[[Any], str]


def swap(network: Any, operations: Collection[str], function: Callable[..., Any], applies: Applies) -> dict[str, str]:
    """Call `function`, with the same arguments, instead of the aten operations of these names (such as "aten.roll").

    Args:
        network: `torch.fx.GraphModule`; changed in place.
        applies: what is done to a node that the function can replace, "" for one that it cannot.
    Returns:
        Node name -> what was done.
    """
    changed = {}
    for node in network.graph.nodes:
        if is_call(node, *operations) and (text := applies(node)):
            node.target = function
            changed[str(node.name)] = text
    return finish(network, changed)


def finish(network: Any, changed: dict[str, str]) -> dict[str, str]:
    """Drop what nothing uses and compile the graph again, where something changed."""
    if changed:
        network.graph.eliminate_dead_code()
        _drop_unread(network)
        network.graph.lint()
        network.recompile()
    return changed


def _drop_unread(network: Any) -> None:
    """Remove weights and buffers that no node reads, so that they are not saved."""
    read = {node.target for node in network.graph.nodes if node.op == "get_attr"}
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    for name in [name for name, _ in named if name not in read]:
        owner, _, last = name.rpartition(".")
        delattr(network.get_submodule(owner), last)


def is_call(node: Any, *operations: str) -> bool:
    """Whether a node calls one of the operations, whatever the overload."""
    packet = getattr(node.target, "overloadpacket", None)
    return node.op == "call_function" and packet is not None and str(packet) in operations


def shape(node: Any) -> tuple[int, ...]:
    """Static shape of a node's tensor; () where it has none."""
    value = node.meta.get("val") if hasattr(node, "meta") else None
    sizes = tuple(getattr(value, "shape", ()))
    return sizes if all(isinstance(size, int) for size in sizes) else ()


def argument(node: Any, index: int, name: str, default: Any) -> Any:
    """An argument by position or keyword."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def tensor(network: Any, node: Any) -> Any:
    """The weight or buffer that a node reads, or None."""
    if getattr(node, "op", "") != "get_attr":
        return None
    return operator.attrgetter(node.target)(network)


def constant(network: Any, before: Any, value: Any) -> Any:
    """A new node, in front of `before`, that reads a new buffer."""
    taken = {name for name, _ in network.named_buffers(recurse=False)}
    name = next(n for n in (f"_rewritten_{i}" for i in range(len(taken) + 1)) if n not in taken)
    network.register_buffer(name, value.detach().clone().contiguous())
    with network.graph.inserting_before(before):
        node = network.graph.get_attr(name)
    node.meta["val"] = value
    return node
