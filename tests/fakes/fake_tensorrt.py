"""A FAKE tensorrt module: no GPU, no engine. It has the names that TensorRT's Python documentation gives to builder,
parser, runtime and inspector, behaves as `state` says, and records what it was asked for.

A serialized engine is JSON: the inspector's answer and the version that built it. `version("8.5.2.2")` and so on take
away what that version does not have.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

__version__ = "10.3.0"


class State:
    """What the fake does and what it has seen; `reset` before each test."""

    def reset(self) -> None:
        self.layers: Callable[[], list[Any]] = list
        self.fails: list[str] = []  # error messages of the next builds, which fail
        self.parser_error = ""
        self.refuses_cache = False
        self.network_flags: list[int] = []
        self.workspaces: list[int] = []
        self.flags: list[str] = []
        self.efforts: list[int] = []
        self.caches: list[bytes] = []
        self.builds = 0
        self.io = "Bindings"
        self.shapes: dict[str, tuple[int, ...]] = {"input": (1,), "output": (1,)}


state = State()
state.reset()


class ILogger:
    class Severity:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.ready = True  # TensorRT refuses a logger whose base was not initialised

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    WARNING = ILogger.Severity.WARNING

    def __init__(self, least: int = ILogger.Severity.WARNING):
        super().__init__()

    def log(self, severity: int, msg: str) -> None:
        """The real one prints."""


class _Kinds10:
    STRONGLY_TYPED, EXPLICIT_BATCH = 1, 0


class _Kinds8:
    EXPLICIT_BATCH = 0


NetworkDefinitionCreationFlag: Any = _Kinds10


class MemoryPoolType:
    WORKSPACE = "WORKSPACE"


class ProfilingVerbosity:
    LAYER_NAMES_ONLY, NONE, DETAILED = "LAYER_NAMES_ONLY", "NONE", "DETAILED"


class LayerInformationFormat:
    ONELINE, JSON = "ONELINE", "JSON"


class BuilderFlag:
    FP16, INT8, SPARSE_WEIGHTS = "FP16", "INT8", "SPARSE_WEIGHTS"


class _HostMemory:
    def __init__(self, data: bytes):
        self.data = data

    def __bytes__(self) -> bytes:  # the real one has the buffer protocol
        return self.data


class _TimingCache:
    def __init__(self, data: bytes):
        self.data = data

    def serialize(self) -> _HostMemory:
        return _HostMemory(self.data + b"+")


class _Config:
    def __init__(self) -> None:
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self._cache: _TimingCache | None = None
        if _number() >= (8, 4):
            self.set_memory_pool_limit = lambda pool, size: state.workspaces.append(size)
        if _number() >= (10,):
            self.builder_optimization_level = 3

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_workspace_size":
            state.workspaces.append(value)
        elif name == "builder_optimization_level":
            state.efforts.append(value)
        object.__setattr__(self, name, value)

    def set_flag(self, flag: str) -> None:
        if _number() >= (11,):
            raise AttributeError(flag)
        state.flags.append(flag)

    def create_timing_cache(self, data: bytes) -> _TimingCache:
        return _TimingCache(data)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        if state.refuses_cache and cache.data:
            return False
        state.caches.append(cache.data)
        self._cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: ILogger):
        if not isinstance(logger, ILogger) or not getattr(logger, "ready", False):
            raise TypeError("a logger is an initialised ILogger")
        self.logger = logger

    def create_network(self, flags: int = 0) -> object:
        state.network_flags.append(flags)
        return object()

    def create_builder_config(self) -> _Config:
        return _Config()

    def build_serialized_network(self, network: object, config: _Config) -> _HostMemory | None:
        state.builds += 1
        if state.fails:
            self.logger.log(ILogger.Severity.ERROR, state.fails.pop(0))
            return None
        self.logger.log(ILogger.Severity.INFO, "built")
        detailed = config.profiling_verbosity == ProfilingVerbosity.DETAILED
        layers = state.layers() if detailed else [layer["Name"] for layer in state.layers()]
        io = ["input"] if state.io == "Bindings" else [{"Name": "input", "IOMode": "Input", "DataType": "Float"}]
        return _HostMemory(json.dumps({"version": __version__, "Layers": layers, state.io: io}).encode())


class OnnxParser:
    def __init__(self, network: object, logger: ILogger):
        self.num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        self.num_errors = 1 if state.parser_error else 0
        return Path(path).is_file() and not state.parser_error

    def get_error(self, index: int) -> str:
        return state.parser_error


class _Inspector:
    def __init__(self, engine: dict[str, Any]):
        self.engine = engine

    def get_engine_information(self, layout: str) -> str:
        return json.dumps({key: value for key, value in self.engine.items() if key != "version"})


class _Context:
    """Doubles float32 numbers from the address of "input" to that of "output"."""

    def __init__(self) -> None:
        self._addresses: dict[str, int] = {}
        if _number() >= (8, 5):
            self.set_tensor_address = self._addresses.__setitem__
            self.execute_async_v3 = lambda stream: self._run(self._addresses["input"], self._addresses["output"])
        else:
            self.execute_v2 = lambda bindings: self._run(*bindings)

    def _run(self, source: int, to: int) -> bool:
        count = math.prod(state.shapes["input"])
        numbers = (ctypes.c_float * count).from_address(source)
        (ctypes.c_float * count).from_address(to)[:] = [2 * number for number in numbers]
        return True


class _Engine:
    def __init__(self, data: dict[str, Any]):
        self.data = data
        if _number() >= (8, 5):
            self.get_tensor_shape = state.shapes.__getitem__
        else:
            self.get_binding_shape = state.shapes.__getitem__
            self.get_binding_index = ["input", "output"].index

    def create_execution_context(self) -> _Context:
        return _Context()

    def create_engine_inspector(self) -> _Inspector:
        return _Inspector(self.data)


class Runtime:
    def __init__(self, logger: ILogger):
        self.logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> _Engine | None:
        try:
            engine = json.loads(data)
        except ValueError:
            engine = {}
        if engine.get("version") != __version__:
            self.logger.log(ILogger.Severity.ERROR, "The engine plan file is not compatible with this version")
            return None
        return _Engine(engine)


def version(number: str) -> None:
    """Become another TensorRT."""
    global __version__, NetworkDefinitionCreationFlag
    __version__ = number
    NetworkDefinitionCreationFlag = _Kinds8 if _number() < (10,) else _Kinds10
    state.io = "I/O Tensors" if _number() >= (11,) else "Bindings"


def _number() -> tuple[int, ...]:
    return tuple(int(part) for part in __version__.split("."))
