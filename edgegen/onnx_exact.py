"""Run Q/DQ files as what they mean, where this processor's integer kernels would not.

Without VNNI an x86 processor adds two products of 8-bit numbers in 16 bits (vpmaddubsw) and cuts off what is larger.
A build for this host has weights of 7 bits then (runtimes/_common.py). What is simulated for another device keeps its
8 bits, and is computed in float between its quantizers.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Two of ONNX Runtime's own rewrites spoil INT8 files (1.31.1). MatMulAddFusion makes a Gemm with a float bias of a
# matrix product and its bias, which no integer kernel takes: INT8 transformers then run in float.
# WeightBiasQuantization quantizes the weights of float layers between INT8 neighbours, layers that a plan keeps in
# float included. Whoever runs such a file elsewhere must switch them off as well; the artifact's options name them.
DISABLED = ("MatMulAddFusion", "WeightBiasQuantization")


def session(file: Path | bytes, *, threads: int = 0) -> Any:
    """An ONNX Runtime session of an INT8 file whose sums are exact on this machine. threads: 0 is its own choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if saturates():  # integer kernels come with the extended optimizations
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(
        file if isinstance(file, bytes) else str(file), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=list(DISABLED),
    )  # fmt: skip


@cache
def saturates() -> bool:
    """Whether ONNX Runtime's integer kernels cut off sums here: tried, with the largest products of 64 channels."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    run = onnxruntime.InferenceSession(_extreme(64).SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = run.run(None, {"x": np.full((1, 64, 8, 8), 255, np.float32)})[0]
    return bool(np.abs(found - 255 * 127 * 64).max() > 0.01 * 255 * 127 * 64)


def _extreme(channels: int) -> onnx.ModelProto:
    """A 1x1 convolution in Q/DQ whose every input can be 255 and every weight is 127; its output has 256 steps."""
    top = np.float32(127 * channels)  # so that the largest sum is step 255
    values = {
        "one": np.float32(1), "zero": np.uint8(0), "out": top, "weights": np.full((8, channels, 1, 1), 127, np.int8),
        "ones": np.ones(8, np.float32), "zeros": np.zeros(8, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["weights", "ones", "zeros"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "out", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "out", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, depth, 8, 8])
            for name, depth in (("x", channels), ("y", 8))]  # fmt: skip
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "extreme", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
