"""Einsum as transposes, reshapes and matrix products.

The letters of two operands fall into four kinds: in both and the result (batch), in both only (summed), in the first
or the second and the result (rows, columns). With these in order it is one matrix product. A letter in one operand and
nowhere else is summed first; one operand is a transpose and a sum; more are taken from left to right. Exact up to the
order of sums. For runtimes without Einsum or without INT8 for it. Diagonals ("ii") and ellipses are left as they are.
"""

from __future__ import annotations

import math
from typing import Any

import onnx

from edgegen.rewrites import _net, _program

KIND = "cure"
REMOVES = ("Einsum", "einsum")
RUNTIMES: tuple[str, ...] = ()


def einsum_to_matmul(model: onnx.ModelProto) -> dict[str, str]:
    """Einsum with static shapes -> Transpose, Reshape, ReduceSum, MatMul."""
    return _net.each(model, ("Einsum",), _rewrite)


def _rewrite(net: _net.Net, node: onnx.NodeProto) -> str:
    shapes = [net.shape(name) for name in node.input]
    parsed = parse(_net.attributes(node)["equation"].decode(), shapes)
    if parsed is None:
        return ""
    terms, result, sizes = parsed
    chain = _net.Chain(net, node)
    name, term = node.input[0], terms[0]
    for i, other in enumerate(terms[1:], 1):
        wanted = set("".join((*terms[i + 1 :], result)))
        name, term = _product(chain, (name, term), (node.input[i], other), wanted, sizes)
    name, term = _summed(chain, name, term, set(result), sizes)
    name = _ordered(chain, name, term, result)
    if not chain.nodes:
        chain.then("Identity", name)
    chain.finish(layer="MatMul")
    return f"{_net.attributes(node)['equation'].decode()} -> transposes and matrix products"


def parse(equation: str, shapes: list[tuple[int, ...]]) -> tuple[list[str], str, dict[str, int]] | None:
    """(terms, result, size of each letter), or None where letters are repeated, broadcast, or sizes unknown."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        result = "".join(sorted(x for x in set(left) - {","} if left.count(x) == 1))
    plain = all(term.isalpha() and len(set(term)) == len(term) for term in terms)
    if not plain or len(set(result)) != len(result) or [len(s) for s in shapes] != [len(term) for term in terms]:
        return None
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes):
        for letter, size in zip(term, shape):
            if sizes.setdefault(letter, size) != size:
                return None
    return (terms, result, sizes) if set(result) <= set(sizes) else None


def _product(
    chain: _net.Chain, first: tuple[str, str], second: tuple[str, str], wanted: set[str], sizes: dict[str, int]
) -> tuple[str, str]:
    """The product of two operands, summed over letters that nobody wants any more."""
    a, one = _summed(chain, *first, wanted | set(second[1]), sizes)
    b, two = _summed(chain, *second, wanted | set(one), sizes)
    batch, inner, rows, columns = kinds(one, two, wanted)
    a = _ordered(chain, a, one, batch + rows + inner)
    b = _ordered(chain, b, two, batch + inner + columns)
    count = [math.prod(sizes[x] for x in letters) for letters in (batch, rows, inner, columns)]
    a = chain.then("Reshape", a, chain.const("left", [count[0], count[1], count[2]]))
    b = chain.then("Reshape", b, chain.const("right", [count[0], count[2], count[3]]))
    out = batch + rows + columns
    return _shaped(chain, chain.then("MatMul", a, b), 3, [sizes[x] for x in out]), out


def kinds(one: str, two: str, wanted: set[str]) -> tuple[str, str, str, str]:
    """Letters in the order of the first operand: (batch, summed, rows, columns)."""
    both = [x for x in one if x in two]
    batch, inner = "".join(x for x in both if x in wanted), "".join(x for x in both if x not in wanted)
    return batch, inner, "".join(x for x in one if x not in two), "".join(x for x in two if x not in one)


def _summed(chain: _net.Chain, name: str, term: str, wanted: set[str], sizes: dict[str, int]) -> tuple[str, str]:
    """Sum over letters that are not wanted."""
    left = "".join(x for x in term if x in wanted)
    if left == term:
        return name, term
    total = chain.reduce("ReduceSum", name, [i for i, x in enumerate(term) if x not in wanted])
    return _shaped(chain, total, len(term), [sizes[x] for x in left]), left


def _shaped(chain: _net.Chain, name: str, rank: int, sizes: list[int]) -> str:
    """A tensor of `rank` axes in another shape; OpenVINO 2026.4 dies of a Reshape to a scalar (an empty constant)."""
    if sizes:
        return chain.then("Reshape", name, chain.const("out", sizes))
    return chain.then("Squeeze", name, chain.const("axes", list(range(rank))))


def _ordered(chain: _net.Chain, name: str, term: str, wanted: str) -> str:
    return name if term == wanted else chain.then("Transpose", name, perm=[term.index(x) for x in wanted])


def program_einsum_to_matmul(network: Any) -> dict[str, str]:
    """The same on a torch program."""

    def applies(node: Any) -> str:
        shapes = [_program.shape(operand) for operand in node.args[1]]
        fits = parse(node.args[0], shapes) is not None
        return f"{node.args[0]} -> permutations and matrix products" if fits else ""

    return _program.swap(network, ("aten.einsum",), _computed, applies)


def _computed(equation: str, operands: Any, path: Any = None) -> Any:
    terms, result, sizes = parse(equation, [tuple(x.shape) for x in operands]) or ([], "", {})
    value, term = operands[0], terms[0]
    for i, other in enumerate(terms[1:], 1):
        wanted = set("".join((*terms[i + 1 :], result)))
        a, one = _total(value, term, wanted | set(other))
        b, two = _total(operands[i], other, wanted | set(one))
        batch, inner, rows, columns = kinds(one, two, wanted)
        count = [math.prod(sizes[x] for x in letters) for letters in (batch, rows, inner, columns)]
        a = a.permute([one.index(x) for x in batch + rows + inner]).reshape(count[0], count[1], count[2])
        b = b.permute([two.index(x) for x in batch + inner + columns]).reshape(count[0], count[2], count[3])
        term = batch + rows + columns
        value = (a @ b).reshape([sizes[x] for x in term])
    value, term = _total(value, term, set(result))
    return value.permute([term.index(x) for x in result])


def _total(value: Any, term: str, wanted: set[str]) -> tuple[Any, str]:
    axes = [i for i, x in enumerate(term) if x not in wanted]
    return (value.sum(axes) if axes else value), "".join(x for x in term if x in wanted)
