"""pnnx as a subprocess in a folder of its own; what it leaves unconverted, loses or kills itself over is an error."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import onnx

from edgegen import errors, onnx_cost
from edgegen.runtimes import _ncnn_file

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_CHATTER = re.compile(r"^(#{3}|[│├└┌]|\d{4}-\d\d-\d\d|(pnnx|ncnn)\w+ = |fp16 = |FLOPS|memory OPS|ignore |todo )")


def convert(source: Path, folder: Path) -> tuple[Path, Path]:
    """(model.param, model.bin) in `folder`, made of the ONNX file `source` that lies in it; FP32.

    pnnx writes a dozen by-products beside its input, and crashes where others raise: it runs in a process of its own
    that knows no other folder, not even a home.

    Raises:
        errors.RuntimeFailed: pnnx crashed, failed, or wrote no network; the message ends with its last telling line.
    """
    import pnnx

    out = folder / "model.param", folder / "model.bin"
    command = [pnnx.EXEC_PATH, source.name, "fp16=0", f"ncnnparam={out[0].name}", f"ncnnbin={out[1].name}"]
    ran = subprocess.run(
        command, cwd=folder, env={"HOME": str(folder), "TMPDIR": str(folder)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    missing = [file.name for file in out if not file.exists()]
    if ran.returncode or missing:
        ended = f"crashed (signal {-ran.returncode})" if ran.returncode < 0 else f"ended with {ran.returncode}"
        wrote = f"wrote no {' and '.join(missing)}" if missing else ""
        how = " and ".join(filter(None, (ended if ran.returncode else "", wrote)))
        raise errors.RuntimeFailed(f"pnnx {how}: {telling(ran.stdout.decode(errors='replace'))}")
    return out


def telling(text: str) -> str:
    """The last line of pnnx's output that is neither a table nor progress."""
    lines = [_ESCAPES.sub("", line).strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not _CHATTER.match(line)]
    return kept[-1][:300] if kept else "it said nothing"


def unknown_layers(param: Path) -> list[_ncnn_file.Layer]:
    """Layers that ncnn does not have: pnnx writes what it cannot convert into the file and succeeds."""
    import ncnn

    return [layer for layer in _ncnn_file.layers(param) if ncnn.layer_to_index(layer.kind) < 0]


def check_layers(param: Path) -> None:
    """Every layer must be one that ncnn has.

    Raises:
        errors.RuntimeFailed: names operators and layers.
    """
    if unknown := unknown_layers(param):
        told = ", ".join(f"{layer.kind} ({layer.name})" for layer in unknown[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise errors.RuntimeFailed(
            f"pnnx left operators that ncnn does not have: {told}{more}; rewrite them with convolutions, reshapes of "
            f"at most four axes and element-wise operations"
        )


def name_layers(param: Path, binary: Path, model: onnx.ModelProto) -> None:
    """Call weighted layers what the graph calls them; they are known by their weights, in graph order among equals."""
    consts = onnx_cost.constants(model)
    waiting: dict[str, list[str]] = {}
    for layer in onnx_cost.cost(model).layers:
        if layer.weight:
            mark = _ncnn_file.fingerprint(onnx.numpy_helper.to_array(consts[layer.weight]))
            waiting.setdefault(mark, []).append(layer.name)
    names: dict[str, str] = {}
    for weight in _ncnn_file.weights(param, binary):
        found = waiting.get(_ncnn_file.fingerprint(weight.values), []) if weight.large else []
        if found and weight.layer not in names:
            names[weight.layer] = found.pop(0)
    _ncnn_file.rename(param, names)
