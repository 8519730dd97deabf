"""Run .tflite files on the CPU, and keep their makers' libraries silent."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on standard error: the converter's C++ writes there, below Python's warnings and logs."""
    os.environ["LITERT_TORCH_SHOW_PROGRESS"] = "n"
    level = logging.root.manager.disable
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        stack.callback(logging.disable, level)
        kept, sink = os.dup(2), stack.enter_context(tempfile.TemporaryFile())
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def open_interpreter(content: bytes | Path, threads: int, *, keep_all: bool = False) -> Any:
    """An interpreter on the CPU with XNNPACK.

    Raises:
        ValueError, RuntimeError: the file is damaged, or holds an operation that the interpreter does not know.
    """
    with quiet():
        from ai_edge_litert.interpreter import Interpreter

        given = {"model_path": str(content)} if isinstance(content, Path) else {"model_content": content}
        interpreter = Interpreter(**given, num_threads=threads, experimental_preserve_all_tensors=keep_all)
        interpreter.allocate_tensors()
    return interpreter


def invoke(interpreter: Any, values: Sequence[np.ndarray], layouts: Sequence[str]) -> list[np.ndarray]:
    """Run on arrays in the graph's layout; outputs are copies in the graph's layout.

    Raises:
        ValueError, RuntimeError: shapes or types do not fit.
    """
    (name,) = interpreter.get_signature_list()
    details = interpreter._get_full_signature_list()[name]
    for index, (value, layout) in enumerate(zip(values, layouts)):
        turned = value.transpose(0, 2, 3, 1) if layout == "NHWC" and value.ndim == 4 else value
        interpreter.set_tensor(details["inputs"][f"args_{index}"], np.ascontiguousarray(turned))
    interpreter.invoke()
    found = []
    for index, layout in enumerate(layouts[len(values) :]):
        value = interpreter.get_tensor(details["outputs"][f"output_{index}"])
        found.append(np.ascontiguousarray(value.transpose(0, 3, 1, 2)) if layout == "NHWC" else value)
    return found


def first_line(error: Exception) -> str:
    """The telling line, without the paths of the converter's own files."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"\S*/site-packages/\S*?: ", "", line)[:300]
