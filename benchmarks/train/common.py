"""What the training scripts share: a resumable loop, an averaged copy of the weights, and the record of a run.

Every batch is a function of (seed, step), so a run that was killed continues as if it had not been.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from edgegen import files, training

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT.parent / "shared" / "assets"
RESULTS = ROOT / "benchmarks" / "results"
PRECISION = "bf16 autocast" if training.has_bf16() else "fp32"  # an emulated bf16 takes ten times as long


@dataclass
class Run:
    """The state of one training: `parts` are modules and optimizers whose state is kept, `curve` a list of points."""

    name: str
    steps: int
    seed: int
    checkpoint: Path
    parts: Mapping[str, Any]
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        kept = ("step", "seconds", "curve", "notes", "steps", "seed")
        own = {key: getattr(self, key) for key in kept}
        with files.whole(self.checkpoint) as temporary:
            torch.save({"run": own, "parts": state}, temporary)

    def resume(self) -> None:
        """Continue from the checkpoint if there is one. A length changed on the way is said in `notes`."""
        if not self.checkpoint.exists():
            return
        saved = torch.load(self.checkpoint, weights_only=True)
        if saved["run"]["seed"] != self.seed:
            raise SystemExit(f"{self.checkpoint} was made with another seed; remove it or use --checkpoint")
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        own = saved["run"]
        for key in ("step", "seconds", "curve", "notes"):
            setattr(self, key, own[key])
        if own["steps"] != self.steps:
            self.notes.append(f"steps (and so the learning rates) changed from {own['steps']} to {self.steps} "
                              f"at step {self.step}")


class Average(nn.Module):
    """Exponential moving average of a module's parameters; buffers are copied. `module` is the averaged copy."""

    def __init__(self, source: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(source).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, source: nn.Module, step: int) -> None:
        """Move towards `source`; early steps move faster, so that the random start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for mine, other in zip(self.module.parameters(), source.parameters()):
            mine.lerp_(other.detach(), 1 - decay)
        for mine, other in zip(self.module.buffers(), source.buffers()):
            mine.copy_(other)


def train(run: Run, step: Callable[[int], dict[str, float]], *, evaluate: Callable[[], dict[str, float]],
          every: int) -> None:
    """Run the steps that are left: `step(i)` makes one update and returns its figures; a checkpoint every minute."""
    run.resume()
    started = last_saved = time.monotonic()
    before, sums, count = run.seconds, {}, 0
    while run.step < run.steps:
        for name, value in step(run.step).items():
            sums[name] = sums.get(name, 0.0) + value
        run.step, count = run.step + 1, count + 1
        now = time.monotonic()
        run.seconds = before + now - started
        if run.step % every == 0 or run.step == run.steps:
            point = {"step": run.step, **{name: value / count for name, value in sums.items()}, **evaluate()}
            run.curve.append({name: round(value, 5) for name, value in point.items()})
            sums, count = {}, 0
            text = " ".join(f"{name} {value:.5g}" for name, value in point.items())
            print(f"{text}  {run.seconds:.0f} s", file=sys.stderr, flush=True)
        if now - last_saved > 60 or run.step == run.steps:
            run.save()
            last_saved = now


def autocast(on: bool = True) -> AbstractContextManager:
    """bf16 where the processor has it, else nothing."""
    return training.autocast(training.resolve_precision("auto" if on else "fp32"))


def cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate: linear rise over `warmup` steps, then half a cosine to 1% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def regression(
    model: nn.Module, average: Average, optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int], tuple[torch.Tensor, torch.Tensor]], steps: int, peak: float,
) -> Callable[[int], dict[str, float]]:  # fmt: skip
    """A step of L1 regression to `batch_at(index)`'s second part, warmed up for 200 steps, then falling to nothing."""

    def step(index: int) -> dict[str, float]:
        set_rate(optimizer, cosine(index, steps, peak, 200))
        given, wanted = batch_at(index)
        with autocast():
            output = model(given)
        loss = nn.functional.l1_loss(output.float(), wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, index)
        return {"l1": loss.item()}

    return step


def generator(seed: int, step: int) -> np.random.Generator:
    """The random numbers of one step."""
    return np.random.default_rng((seed, step))


def dihedral(array: np.ndarray, which: int) -> np.ndarray:
    """One of the eight symmetries of the square for (H, W, C): `which` 0..7."""
    turned = np.rot90(array, which % 4)
    return turned[:, ::-1] if which >= 4 else turned


def write_weights(module: nn.Module, path: Path, *, half: bool = False) -> None:
    """Write a plain state_dict, whole or not at all; with `half`, floats are stored as FP16."""
    def stored(tensor: torch.Tensor) -> torch.Tensor:
        smaller = tensor.half() if half and tensor.is_floating_point() else tensor
        return smaller.detach().clone(memory_format=torch.contiguous_format)

    with files.whole(path) as temporary:
        save_file({key: stored(value) for key, value in module.state_dict().items()}, temporary)
        temporary.chmod(0o644)


def record(run: Run, *, settings: Mapping[str, Any], figures: Mapping[str, Any], weights: Path, module: nn.Module,
           data: str) -> None:
    """Write benchmarks/results/train-<name>.json."""
    files.write_json(RESULTS / f"train-{run.name}.json", {
        "name": run.name,
        "date": datetime.date.today().isoformat(),
        "data": data,
        "seed": run.seed,
        "steps": run.steps,
        "seconds": round(run.seconds, 1),
        "settings": dict(settings),
        "figures": dict(figures),
        "curve": run.curve,
        "notes": run.notes,
        "weights": {
            "file": str(weights.relative_to(ROOT)),
            "bytes": weights.stat().st_size,
            "sha256": files.sha256(weights),
            "parameters": sum(p.numel() for p in module.parameters()),
        },
        "machine": machine(),
    })


def machine() -> dict[str, Any]:
    """What the run ran on; the load says whether its seconds mean anything."""
    return {
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def arguments(doc: str, *, steps: int, seed: int = 0) -> argparse.Namespace:
    """The options that all scripts share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="default: out/train/<name>.pt in the repository")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if not ASSETS.is_dir():
        raise SystemExit(f"the training images are expected in {ASSETS}")
    return options


def checkpoint(options: argparse.Namespace, name: str) -> Path:
    """Where the run keeps its state."""
    return options.checkpoint or ROOT / "out" / "train" / f"{name}.pt"
