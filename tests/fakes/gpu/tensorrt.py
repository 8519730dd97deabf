"""A FAKE tensorrt, for tests without one: an "engine" is a JSON file {"floats": n}; it doubles n float32 values."""

import ctypes
import json

__version__ = "10.3.0"


class Logger:
    WARNING = 2

    def __init__(self, severity):
        self.severity = severity


class _Context:
    def __init__(self, floats):
        self.floats, self.places = floats, {}

    def set_tensor_address(self, name, address):
        self.places[name] = address

    def execute_async_v3(self, stream):
        kind = ctypes.POINTER(ctypes.c_float)
        source, to = (ctypes.cast(self.places[name], kind) for name in ("input", "output"))
        for number in range(self.floats):
            to[number] = 2 * source[number]
        return stream == 7


class _Engine:
    def __init__(self, floats):
        self.floats = floats

    def create_execution_context(self):
        return _Context(self.floats)


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, content):
        told = json.loads(content)
        return _Engine(told["floats"]) if "floats" in told else None
