"""What a network computes, call by call: which torch function, in which module, from which earlier results.

Recorded on one real run (torch.overrides.TorchFunctionMode), so it holds for networks without control flow that
depends on values. Networks that `torch.fx` cannot trace are recorded all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edgegen import graph

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
WEIGHTED = (*CONVOLUTIONS, "linear")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Call:
    """One call whose result is a tensor of floating point, or several.

    index: its place among all such calls. name: the torch function. path: the innermost module it happened in.
    sources: indices of the calls that made its tensor arguments; -1 - i for network input i. shape, value: of its
    result, where that is one tensor; the value only where it was asked for. users: indices of the calls that take its
    result; -1 for the network's output, -2 for a call that makes a mask or an index of it.
    """

    index: int
    name: str
    path: str
    sources: tuple[int, ...]
    shape: tuple[int, ...]
    value: torch.Tensor | None = None
    users: list[int] = field(default_factory=list)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in arguments, inside lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


class Counting(TorchFunctionMode):
    """Counts the calls that return a floating tensor, or several; subclasses look at them, or change their results."""

    def __init__(self) -> None:
        super().__init__()
        self.index = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; hand over what counts."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        args, kwargs = self.before(name, args, kwargs)
        out = func(*args, **kwargs)
        if not any(tensor.is_floating_point() for tensor in tensors(out)):
            return self.uncounted(out)
        index, self.index = self.index, self.index + 1
        return self.after(index, name, args, kwargs, out)

    def uncounted(self, out: Any) -> Any:
        """What to do with a result that holds no floating tensor."""
        return out

    def before(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments to call with."""
        return args, kwargs

    def after(self, index: int, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        """The result to hand on."""
        return out


class _Recorder(Counting):
    def __init__(self, inputs: Sequence[torch.Tensor], stack: list[str], values: bool) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.stack, self.values = stack, values
        self.kept: list[Any] = [inputs]  # so that no id is used again
        self.maker = {id(tensor): -1 - i for i, tensor in enumerate(inputs)}

    def before(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        # before the call: one that works in place is a new maker of its own argument
        found = [self.maker.get(id(tensor)) for tensor in tensors([args, kwargs])]
        self.sources = tuple(index for index in found if index is not None)
        return args, kwargs

    def uncounted(self, out: Any) -> Any:
        if any(True for _ in tensors(out)):  # a mask or an index made of values: a user all the same
            for source in self.sources:
                if source >= 0:
                    self.calls[source].users.append(-2)
        return out

    def after(self, index: int, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else ()
        call = Call(index, name.rstrip("_"), self.stack[-1] if self.stack else "", self.sources, shape)
        if self.values and isinstance(out, torch.Tensor):
            call.value = out.detach().clone()
        for source in call.sources:
            if source >= 0:
                self.calls[source].users.append(index)
        self.calls.append(call)
        self.kept.append(out)
        self.maker |= {id(tensor): index for tensor in tensors(out)}
        return out


def record(module: nn.Module, inputs: Sequence[torch.Tensor], *, values: bool = False) -> list[Call]:
    """Every call of one run in eval mode, in order."""
    stack: list[str] = []
    with _paths(module, stack), torch.no_grad(), _Recorder(inputs, stack, values) as recorder:
        module.eval()
        out = module(*inputs)
    for tensor in tensors(out):
        if (index := recorder.maker.get(id(tensor), -1)) >= 0:
            recorder.calls[index].users.append(-1)
    return recorder.calls


@contextmanager
def _paths(module: nn.Module, stack: list[str]) -> Iterator[None]:
    def leave(*_: Any) -> None:  # a hook that returned something would put it in the place of the output
        stack.pop()

    handles = []
    for path, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda _, args, path=path: stack.append(path)))
        handles.append(part.register_forward_hook(leave, always_call=True))
    with graph.hooked(handles):
        yield


def layers(module: nn.Module, calls: Sequence[Call]) -> dict[int, str]:
    """Index of a call -> path of the convolution or linear layer that makes it, for layers that run exactly once."""
    found = {
        call.index: call.path for call in calls
        if call.name in WEIGHTED and isinstance(module.get_submodule(call.path), graph.WEIGHTED)
        and "weight" in module.get_submodule(call.path)._parameters
    }  # fmt: skip
    paths = list(found.values())
    same: dict[int, int] = {}
    for path in set(paths):  # a weight that two layers share may not be scaled for one of them
        same[id(module.get_submodule(path).weight)] = same.get(id(module.get_submodule(path).weight), 0) + 1
    return {
        index: path for index, path in found.items()
        if paths.count(path) == 1 and same[id(module.get_submodule(path).weight)] == 1
    }  # fmt: skip


def fold(module: nn.Module, inputs: Sequence[torch.Tensor]) -> dict[str, str]:
    """Fold batch norms into the layer right before them, in place, exactly (Jacob et al., 2018, section 3.2).

    INT8 builds quantize the folded weights, so whoever changes weights for their sake has to see these. A folded norm
    becomes Identity; one with an activation inside (a subclass) keeps its place with no effect of its own.

    Returns:
        Layer -> norm that it took in.
    """
    calls = record(module, inputs)
    found, done = layers(module, calls), {}
    for call in calls:
        if call.name != "batch_norm" or len(call.sources) != 1 or call.sources[0] not in found:
            continue
        norm, path = module.get_submodule(call.path), found[call.sources[0]]
        layer = module.get_submodule(path)
        transposed = type(layer).__name__.startswith("ConvTranspose")
        alone = calls[call.sources[0]].users == [call.index]
        if isinstance(norm, BATCH_NORMS) and norm.running_mean is not None and alone and (
            not transposed or layer.groups == 1
        ):
            _fold_one(module, layer, norm, call.path, transposed)
            done[path] = call.path
    return done


def _fold_one(module: nn.Module, layer: Any, norm: Any, path: str, transposed: bool) -> None:
    weight, bias = nn.utils.fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias, transposed
    )
    layer.weight.data = weight.data
    layer.bias = nn.Parameter(bias.data)
    if type(norm) in BATCH_NORMS:
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, nn.Identity().train(norm.training))
        return
    with torch.no_grad():
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        for tensor, value in ((norm.weight, 1.0), (norm.bias, 0.0)):
            if tensor is not None:
                tensor.fill_(value)


def bias_of(layer: Any) -> torch.Tensor:
    """The layer's bias; one of zeros is made where it has none."""
    if layer.bias is None:
        transposed = type(layer).__name__.startswith("ConvTranspose")
        width = layer.weight.shape[1] * layer.groups if transposed else layer.weight.shape[0]
        layer.bias = nn.Parameter(torch.zeros(width))
    return layer.bias
