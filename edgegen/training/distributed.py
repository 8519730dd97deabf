"""One training in several processes, on one machine or several: PyTorch's DDP, started by `torchrun`.

    torchrun --nproc-per-node 2 train.py                      # gloo on CPUs
    torchrun --nnodes 2 --nproc-per-node 8 ... train.py       # nccl on CUDA, one GPU each

The script is the one that a single process would run; `training.train`, and so `passes.distill`, joins the others by
what `torchrun` left in the environment, and all end with the same weights. What may happen only once, such as building,
timing and writing, goes behind `first()`, with `wait()` where the others need what it made:

    with distributed.joined(device):
        result = distill(model, job, steps=1000)
        if distributed.first():
            weights.save_state(result.model.stage.module, path)
        distributed.wait()

Every process makes the same batch and keeps its share of the samples, so n processes give the weights of one up to the
order of sums: gradients are averaged by DDP, and batch norm in training has its statistics over all processes (torch's
own SyncBatchNorm runs on CUDA only). Dropout differs: each process draws its own. The first process writes checkpoints
and all read them, so the folder must be one that all machines see. The `edgegen` command itself is one process.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Group:
    """Which process this is (rank, from 0) and how many there are (count)."""

    rank: int = 0
    count: int = 1


def group() -> Group:
    """This process among those that it has joined; alone: rank 0 of 1."""
    return Group(dist.get_rank(), dist.get_world_size()) if _joined() else Group()


def first() -> bool:
    """Whether this is the process that writes and measures: rank 0 among the joined, or among torchrun's."""
    return (group().rank if _joined() else int(os.environ.get("RANK", "0"))) == 0


def wait() -> None:
    """Go on when all processes are here."""
    if _joined():
        dist.barrier()


def own_device(device: str) -> str:
    """This process' device: "cuda" is the GPU of its number on this machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def joined(device: str = "cpu") -> Iterator[Group]:
    """Be one of torchrun's processes inside the body. Nothing for a single process or one that has joined already."""
    if _joined() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield group()
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(own_device(device))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield group()
    finally:
        dist.destroy_process_group()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def share(value: Any, own: Group) -> Any:
    """The samples of this process: an equal part of every tensor's first axis, in tuples, lists and dictionaries.

    Raises:
        ValueError: the samples cannot be shared evenly.
    """
    if own.count == 1:
        return value
    if isinstance(value, torch.Tensor) and value.ndim:
        if len(value) % own.count:
            raise ValueError(
                f"a batch of {len(value)} cannot be shared evenly by {own.count} processes; take a multiple of it"
            )
        size = len(value) // own.count
        return value[own.rank * size : (own.rank + 1) * size]
    if isinstance(value, dict):
        return {name: share(item, own) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(share(item, own) for item in value)
    return value


def mean(values: Sequence[float]) -> list[float]:
    """Each value averaged over the processes; one that is not finite anywhere is so everywhere."""
    own = group()
    if own.count == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return [value / own.count for value in total.tolist()]


def from_first(value: Callable[[], float]) -> float:
    """A number that only the first process works out; the others wait for it."""
    if group().count == 1:
        return value()
    told = torch.tensor([value() if first() else 0.0], dtype=torch.float64, device=_device())
    dist.broadcast(told, 0)
    return told.item()


def check_agree(what: str, value: int) -> None:
    """Raise ValueError in every process unless all have the same number."""
    average, square = mean([float(value), float(value) ** 2])
    if square - average**2 > 1e-9:
        raise ValueError(f"the processes disagree about {what} ({value} here); give a folder that all of them see")


def _device() -> str:
    """Where the group's backend takes tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


class Step(nn.Module):
    """A loss as a module's `forward`, as DDP wants it: it averages the gradients of every parameter in `module`."""

    def __init__(self, module: nn.Module, loss_step: Callable[[nn.Module, Any, int], Any]) -> None:
        super().__init__()
        self.module, self.loss_step = module, loss_step

    def forward(self, batch: Any, step: int) -> Any:
        found = self.loss_step(self.module, batch, step)
        return dict(found) if isinstance(found, Mapping) else found


def wrapped(module: nn.Module, loss_step: Callable[[nn.Module, Any, int], Any]) -> nn.Module:
    """The loss as a module (batch, step) -> loss; under several processes in DDP, which averages the gradients."""
    step = Step(module, loss_step)
    if group().count == 1:
        return step
    ddp: Any = nn.parallel.DistributedDataParallel
    newer = "forward_sync_buffers" in inspect.signature(ddp).parameters  # `synced` keeps buffers equal
    # Not every loss uses every parameter in every step, and a network may hold some that it never uses.
    return ddp(step, find_unused_parameters=True, **{"forward_sync_buffers" if newer else "broadcast_buffers": False})


def without_sync(module: Any, last: bool) -> Any:
    """Gradients are exchanged once a step: not before its last part."""
    return nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()


@contextmanager
def synced(module: nn.Module) -> Iterator[None]:
    """Batch norms in training mode take mean and variance over all processes, inside the body."""
    norms = [part for part in module.modules() if isinstance(part, BatchNorm)] if group().count > 1 else []
    for norm in norms:
        norm.__dict__["forward"] = _forward(norm, norm.forward)
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__["forward"]


def _forward(norm: Any, alone: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return _normalised(norm, x) if norm.training else alone(x)

    return forward


def _normalised(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Batch norm of (N, C, ...) over all processes, which hold equal shares; the running statistics move along."""
    count, axes = group().count, [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    values = x.float()
    average = _sum(values.mean(axes)) / count
    centred = values - average.view(shape)
    variance = _sum(centred.square().mean(axes)) / count
    if norm.track_running_stats:
        number = values.numel() // values.shape[1] * count
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(average.detach(), norm.momentum)
            norm.running_var.lerp_(variance.detach() * (number / max(1, number - 1)), norm.momentum)
    out = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes, in both directions."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.apply(gradient.contiguous())


def _sum(value: torch.Tensor) -> torch.Tensor:
    return _Sum.apply(value)
