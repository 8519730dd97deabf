"""What runtimes make of ONNX operators: which are free, of which kind the others are, and what is fused with what.

Read off the graphs that the runtimes themselves report: ONNX Runtime's profile, OpenVINO's runtime model, the operators
of a LiteRT and an ncnn file, the delegates of an ExecuTorch program.
"""

from __future__ import annotations

from collections.abc import Mapping

FREE = frozenset((
    "Cast", "Constant", "ConstantOfShape", "DequantizeLinear", "Dropout", "Flatten", "Identity", "QuantizeLinear",
    "Range", "Reshape", "Shape", "Squeeze", "Unsqueeze",
))  # fmt: skip
ACTIVATIONS = frozenset((
    "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Sigmoid", "Silu", "Tanh",
))  # fmt: skip
CURVED = frozenset((
    "Elu", "Erf", "Exp", "Gelu", "Log", "Mish", "Pow", "Sigmoid", "Silu", "Softmax", "Softplus", "Tanh",
))  # fmt: skip
_KIND = {
    "scale": ("BatchNormalization",),
    "norm": ("GroupNormalization", "InstanceNormalization"),
    "layernorm": ("LayerNormalization", "LpNormalization", "RMSNormalization"),
    "softmax": ("LogSoftmax", "Softmax"),
    "pool": ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMax", "ReduceMean", "ReduceSum",
             "ReduceL2"),
    "resize": ("GridSample", "Resize", "Upsample"),
    "concat": ("Concat",),
    "pad": ("Pad",),
    "transpose": ("DepthToSpace", "SpaceToDepth", "Transpose"),
    "movement": ("Expand", "Gather", "Slice", "Split", "Tile"),
    "activation": ACTIVATIONS,
}  # fmt: skip
KIND_OF: Mapping[str, str] = {op: kind for kind, ops in _KIND.items() for op in ops}

# Activations that a runtime computes inside the convolution before them, and whether it adds a shortcut there.
FUSED: Mapping[str, frozenset[str]] = {
    "onnxruntime": frozenset(("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid")),
    "openvino": ACTIVATIONS,
    "tensorrt": ACTIVATIONS,
    "coreml": ACTIVATIONS,
    "executorch": frozenset(("Relu", "Clip")),
    "litert": frozenset(("Relu", "Clip")),
    "ncnn": frozenset(("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSwish", "Mish")),
}
SHORTCUTS = frozenset(("onnxruntime", "openvino", "tensorrt", "coreml"))
CHAINS = frozenset(("openvino", "tensorrt", "coreml"))
"""Runtimes that compute a norm, or an operation on elements, and all such ones behind it in one pass."""
CLAMPED: Mapping[str, frozenset[str]] = {
    "executorch": frozenset(("Add", "BatchNormalization", "Div", "Mul", "Sub")),
    "litert": frozenset(("Add", "BatchNormalization", "Div", "Mul", "Sub")),
}
"""Operations other than weighted ones that end in a Relu or Clip at no cost."""
EIGHT = frozenset((
    "Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu", "Resize", "Slice", "Split",
    "Transpose",
))  # fmt: skip
"""Operations that stay in INT8 between layers in INT8; what goes from there to others, or back, is cast."""
FUSED_INT8: Mapping[str, frozenset[str]] = {"onnxruntime": frozenset(("Relu", "Clip"))}
"""As `FUSED`, where layers in INT8 take in less than those in float; such ones add no shortcut."""
SCALED = frozenset(("onnxruntime",))
"""Runtimes that make a convolution of one weight a channel of a batch norm with none before it, and fuse as there."""
