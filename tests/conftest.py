"""The three tiny models that tests share. Heavy imports stay inside, so that light tests stay light."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgegen.types import Graph, Model, Preprocessing, Stage, TensorSpec

TINY = ("conv_chain", "residual", "depthwise_generator")


def pytest_configure() -> None:
    """Processes of pytest-xdist share out the cores: runtimes of two tests that spin on the same core crawl."""
    name, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if name is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(name.removeprefix("gw")) % len(cores) :: count])


@pytest.fixture(autouse=True)
def _signals_stay() -> Iterator[None]:
    """A test that calls the command line in this process must not change how pytest itself ends, nor its children."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _conv_chain() -> Any:
    """Classifier: three convolutions with batch norm, pooling, linear. (1, 3, 16, 16) to (1, 10)."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def _residual() -> Any:
    """Image to image: two residual blocks around one width, tanh-free. (1, 3, 16, 16) to the same."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
            self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU()

        def forward(self, x: Any) -> Any:
            return x + self.conv2(self.act(self.norm(self.conv1(x))))

    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Block(16), Block(16), nn.Conv2d(16, 3, 3, padding=1))


def _depthwise_generator() -> Any:
    """Super-resolution x2: depthwise and pointwise convolutions, a skip, pixel shuffle. (1, 3, 16, 16) to 32x32."""
    from torch import nn

    class Generator(nn.Module):
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.head, self.act = nn.Conv2d(3, width, 3, padding=1), nn.ReLU()
            self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
            self.pointwise = nn.Conv2d(width, width, 1)
            self.up, self.shuffle = nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2)
            self.tail = nn.Conv2d(width, 3, 3, padding=1)

        def forward(self, x: Any) -> Any:
            x = self.act(self.head(x))
            x = x + self.pointwise(self.act(self.depthwise(x)))
            return self.tail(self.act(self.shuffle(self.up(x))))

    return Generator()


def make_tiny(name: str) -> Model:
    """A fresh tiny model by name; the same weights every time, with batch-norm statistics that are not trivial."""
    import torch

    tasks = {"conv_chain": "classification", "residual": "image-to-image", "depthwise_generator": "super-resolution"}
    shapes = {"conv_chain": (1, 10), "residual": (1, 3, 16, 16), "depthwise_generator": (1, 3, 32, 32)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = globals()[f"_{name}"]().eval()
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 1.5)
    image = TensorSpec("input", (1, 3, 16, 16), value_range=(0.0, 1.0))
    output = TensorSpec("output", shapes[name], value_range=None if name == "conv_chain" else (0.0, 1.0))
    options = {"scale": 2} if name == "depthwise_generator" else {}
    return Model(name, tasks[name], (Stage("main", module, (image,), (output,)),), Preprocessing(), options=options)


@pytest.fixture
def conv_chain() -> Model:
    """A classifier with batch norms."""
    return make_tiny("conv_chain")


@pytest.fixture
def residual() -> Model:
    """An image-to-image network whose layers are coupled by additions."""
    return make_tiny("residual")


@pytest.fixture
def depthwise_generator() -> Model:
    """A x2 super-resolution generator: depthwise convolution, skip, pixel shuffle."""
    return make_tiny("depthwise_generator")


@pytest.fixture(params=TINY)
def tiny_model(request: pytest.FixtureRequest) -> Model:
    """Each of the three in turn."""
    return make_tiny(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: sums in one order, and tiny networks do not wait for a second core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """bundles(name, **how): small bundles to measure, each made once."""
    from bundles_for_devices import made_once

    return made_once(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Stage, Graph]]:
    """The three tiny models, with the output of a module that is left in training mode exactly as it was."""
    from edgegen import onnx_graph

    found = {}
    for name in ("conv_chain", "residual", "depthwise_generator"):
        stage = make_tiny(name).stage
        found[name] = (stage, onnx_graph.to_onnx(stage, tmp_path_factory.mktemp(name) / "graph.onnx"))
    return found
