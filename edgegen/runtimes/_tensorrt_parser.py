"""What TensorRT's ONNX parser takes, by version: operator sets, operators and their limits. Known without a device.

From docs/operators.md of github.com/onnx/onnx-tensorrt (the tables of 8.4, 8.5 and 10.15); the parser on the device has
the last word.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from edgegen.types import Problem, Target

Version = tuple[int, ...]

# First release -> newest operator set. 20 for 10.0 to 10.14 is from memory, the others are stated.
OPSETS: tuple[tuple[Version, int], ...] = (((8, 0), 13), ((8, 5), 17), ((10, 0), 20), ((10, 15), 24), ((11, 0), 25))

_NEVER_TEXT = """AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Col2Im CenterCropPad Compress
ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool
MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv
QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength
SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringNormalizer TfIdfVectorizer Unique"""
_SINCE_TEXT: tuple[tuple[Version, str], ...] = (
    ((8, 5), "GridSample HardSwish MeanVarianceNormalization Mod NonZero OneHot RandomNormal RandomNormalLike "
             "Reciprocal RoiAlign Trilu"),
    ((8, 6), "BlackmanWindow GroupNormalization HammingWindow HannWindow Hardmax IsInf LayerNormalization STFT"),
    ((10, 0), "DeformConv Gelu Mish"),
)  # fmt: skip
_CURES = {
    "DynamicQuantizeLinear": "quantize with fixed scales: an int8 build of edgegen does",
    "ConvInteger": "give the float model; edgegen quantizes it", "QLinearConv": "give the float model; edgegen "
    "quantizes it", "QLinearMatMul": "give the float model; edgegen quantizes it",
    "MatMulInteger": "give the float model; edgegen quantizes it",
    "Col2Im": "replace fold (Col2Im) by a transposed convolution with a constant kernel",
    "AffineGrid": "compute the grid before the export and give it as a constant or an input",
    "MaxUnpool": "replace max-unpooling by resize and convolution",
    "GridSample": "replace the sampling by resize and convolution, or use a newer JetPack",
    "DeformConv": "replace the deformable convolution by a plain one, or use a newer JetPack",
    "DFT": "replace the transform by a matrix product with a constant matrix",
}  # fmt: skip
_COORDINATES = {"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"}


def version(target: Target) -> Version:
    """TensorRT's version on the target; 10.0 when the target does not state it."""
    told = target.release.tensorrt if target.release else target.versions.get("tensorrt", "10.0")
    return tuple(int(part) for part in told.split("."))


def opset(target: Target) -> int:
    """Newest ONNX operator set that the target's parser takes."""
    if target.release:
        return target.release.opset
    return max(newest for first, newest in OPSETS if first <= max(version(target), (8, 0)))


def refused(target: Target) -> frozenset[str]:
    """Operators that the target's parser does not know at all."""
    later = (names.split() for first, names in _SINCE_TEXT if version(target) < first)
    return frozenset(_NEVER_TEXT.split()).union(*later)


def problems(model: onnx.ModelProto, target: Target) -> list[Problem]:
    """Operators of a graph that the target's parser refuses, each with its nearest cure."""
    found, missing = [], refused(target)
    newest = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if newest > opset(target):
        found.append(Problem("graph", "", f"is in opset {newest}, the parser of TensorRT "
                                          f"{'.'.join(map(str, version(target)))} takes up to {opset(target)}"))
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            cure = "rewrite it with standard ONNX operations, or give TensorRT a plugin of that name"
            found.append(Problem(f"{node.domain}.{node.op_type}", node.name, cure))
        elif node.op_type in missing:
            cure = _CURES.get(node.op_type, "rewrite it with operations that the parser takes")
            found.append(Problem(node.op_type, node.name, cure))
        else:
            found += [Problem(node.op_type, node.name, cure) for cure in _limits(node)]
    return found


def _limits(node: onnx.NodeProto) -> Iterator[str]:
    """What the parser does not take of an operator that it knows."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    dilated = any(d != 1 for d in given.get("dilations", ()))
    if node.op_type == "Resize":
        if given.get("mode", b"nearest") == b"cubic":
            yield "resize with mode linear or nearest, or with a convolution that holds the bicubic kernel"
        if given.get("antialias", 0):
            yield "switch antialiasing off, or shrink by average pooling"
        if given.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
            yield "give both scales (keep_aspect_ratio_policy stretch)"
        if (how := given.get("coordinate_transformation_mode", b"half_pixel").decode()) not in _COORDINATES:
            yield f"use half_pixel coordinates instead of {how}"
    elif node.op_type == "MaxPool" and len([name for name in node.output if name]) > 1:
        yield "do not ask for the indices of the maxima"
    elif node.op_type in ("MaxPool", "AveragePool", "LpPool") and dilated:
        yield "pool without dilation"
    elif node.op_type == "ScatterND" and given.get("reduction", b"none") != b"none":
        yield "scatter without a reduction, or write the sum as a matrix product"
    elif node.op_type == "LayerNormalization" and len([name for name in node.output if name]) > 1:
        yield "use only the first output of the normalization"
