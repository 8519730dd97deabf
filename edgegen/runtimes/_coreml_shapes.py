"""The rest of `_coreml_ops`: normalisation, pooling, resizing, and what moves values about without changing them."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgegen import errors
from edgegen.runtimes._coreml_ops import handles, ints, pads_of, value

_FAR = np.iinfo(np.int64).max


# ------------------------------------------------------------------------------------------------- normalisation


def _number(w: Any, number: float) -> str:
    return str(w.constant(np.float32(number)))


def _scaled(w: Any, op: Any, x: str, shape: list[int], out: str) -> None:
    """x * gamma + beta, each reshaped to `shape`; either may be absent."""
    for name, kind in (("gamma", "Mul"), ("beta", "Add")):
        if (found := value(op, name)) is not None:
            x = w.add(kind, [x, w.constant(np.reshape(found, shape))])
    w.add("Identity", [x], out)


@handles("layer_norm")
def _layer_norm(w: Any, op: Any, out: str) -> None:
    x, rank = w.ref(op.inputs["x"]), len(op.outputs[0].shape)
    axes = [a % rank for a in ints(op, "axes", list(range(rank)))]
    held = w.constant(np.array(axes))
    centred = w.add("Sub", [x, w.add("ReduceMean", [x, held])])
    variance = w.add("ReduceMean", [w.add("Mul", [centred, centred]), held])
    spread = w.add("Sqrt", [w.add("Add", [variance, _number(w, float(value(op, "epsilon", 1e-5)))])])
    shape = [int(d) if i in axes else 1 for i, d in enumerate(op.outputs[0].shape)]
    _scaled(w, op, w.add("Div", [centred, spread]), shape, out)


@handles("instance_norm", "batch_norm")
def _channel_norm(w: Any, op: Any, out: str) -> None:
    x, channels = w.ref(op.inputs["x"]), int(op.inputs["x"].shape[1])
    gamma = w.constant(value(op, "gamma", np.ones(channels, np.float32)))
    beta = w.constant(value(op, "beta", np.zeros(channels, np.float32)))
    epsilon = float(value(op, "epsilon", 1e-5))
    if op.op_type == "instance_norm":
        w.add("InstanceNormalization", [x, gamma, beta], out, epsilon=epsilon)
    else:
        stats = [w.ref(op.inputs["mean"]), w.ref(op.inputs["variance"])]
        w.add("BatchNormalization", [x, gamma, beta, *stats], out, epsilon=epsilon)


@handles("l2_norm")
def _l2_norm(w: Any, op: Any, out: str) -> None:
    x = w.ref(op.inputs["x"])
    total = w.add("ReduceSumSquare", [x, w.constant(np.array([-3, -2, -1]))])
    root = w.add("Sqrt", [w.add("Add", [total, _number(w, float(value(op, "epsilon", 1e-6)))])])
    w.add("Div", [x, root], out)


@handles("softmax")
def _softmax(w: Any, op: Any, out: str) -> None:
    w.add("Softmax", [w.ref(op.inputs["x"])], out, axis=int(value(op, "axis", -1)))


# ------------------------------------------------------------------------------------------- pooling and resizing


@handles("avg_pool", "max_pool")
def _pool(w: Any, op: Any, out: str) -> None:
    dims = len(op.outputs[0].shape) - 2
    options: dict[str, Any] = {
        "kernel_shape": ints(op, "kernel_sizes"),
        "strides": ints(op, "strides", [1] * dims),
        "ceil_mode": int(bool(value(op, "ceil_mode", False))),
        **pads_of(op, dims),
    }
    if op.op_type == "avg_pool":
        options["count_include_pad"] = int(not bool(value(op, "exclude_padding_from_average", False)))
    w.add("AveragePool" if op.op_type == "avg_pool" else "MaxPool", [w.ref(op.inputs["x"])], out, **options)


@handles("upsample_bilinear", "upsample_nearest_neighbor", "resize_bilinear")
def _resize(w: Any, op: Any, out: str) -> None:
    kind, x = op.op_type, w.ref(op.inputs["x"])
    if kind == "upsample_nearest_neighbor":
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        if kind == "upsample_bilinear":
            aligned = bool(value(op, "align_corners", True))
            centred = bool(value(op, "half_pixel_centers", not aligned))
            mode = "align_corners" if aligned else "half_pixel" if centred else "asymmetric"
        else:
            named = {"STRICT_ALIGN_CORNERS": "align_corners", "UNALIGN_CORNERS": "half_pixel"}
            mode = named.get(str(value(op, "sampling_mode", "DEFAULT")), "")
        if not mode:
            raise errors.RuntimeFailed(f"coreml: {kind} {op.name} samples in a way that is not checked here")
        options = {"mode": "linear", "coordinate_transformation_mode": mode}
    w.add("Resize", [x, "", "", w.constant(np.array(op.outputs[0].shape, np.int64))], out, **options)


@handles("pad")
def _pad(w: Any, op: Any, out: str) -> None:
    pads, rank = ints(op, "pad"), len(op.outputs[0].shape)
    whole = [0] * (2 * rank - len(pads)) + pads
    mode = str(value(op, "mode", "constant"))
    inputs = [w.ref(op.inputs["x"]), w.constant(np.array(whole[0::2] + whole[1::2]))]
    if mode == "constant":
        inputs.append(_number(w, float(value(op, "constant_val", 0.0))))
    w.add("Pad", inputs, out, mode={"replicate": "edge"}.get(mode, mode))


@handles("pixel_shuffle", "depth_to_space", "space_to_depth", "pixel_unshuffle")
def _blocks(w: Any, op: Any, out: str) -> None:
    x, kind = w.ref(op.inputs["x"]), op.op_type
    if kind == "pixel_shuffle":
        w.add("DepthToSpace", [x], out, blocksize=int(value(op, "upscale_factor")), mode="CRD")
    elif kind == "pixel_unshuffle":
        n, c, height, width = (int(d) for d in op.inputs["x"].shape)
        r = int(value(op, "downscale_factor"))
        split = w.add("Reshape", [x, w.constant(np.array([n, c, height // r, r, width // r, r]))])
        turned = w.add("Transpose", [split], perm=[0, 1, 3, 5, 2, 4])
        w.add("Reshape", [turned, w.constant(np.array([n, c * r * r, height // r, width // r]))], out)
    else:
        onnx_kind = "DepthToSpace" if kind == "depth_to_space" else "SpaceToDepth"
        w.add(onnx_kind, [x], out, blocksize=int(value(op, "block_size")))


# -------------------------------------------------------------------------------------------------------- moving


@handles("reshape", "expand_dims", "squeeze", "flatten2d")
def _reshape(w: Any, op: Any, out: str) -> None:
    """The shape of the result is known: these graphs are static."""
    w.add("Reshape", [w.ref(op.inputs["x"]), w.constant(np.array(op.outputs[0].shape, np.int64))], out)


@handles("transpose", "tile", "reverse", "cumsum")
def _arrange(w: Any, op: Any, out: str) -> None:
    x, kind = w.ref(op.inputs["x"]), op.op_type
    if kind == "transpose":
        rank = len(op.outputs[0].shape)
        w.add("Transpose", [x], out, perm=[a % rank for a in ints(op, "perm")])
    elif kind == "tile":
        w.add("Tile", [x, w.constant(np.array(ints(op, "reps")))], out)
    elif kind == "cumsum":
        exclusive, back = int(bool(value(op, "exclusive", False))), int(bool(value(op, "reverse", False)))
        w.add("CumSum", [x, w.constant(np.int64(value(op, "axis", 0)))], out, exclusive=exclusive, reverse=back)
    else:
        axes = ints(op, "axes", list(range(len(op.outputs[0].shape))))
        parts = [[-1] * len(axes), [-_FAR] * len(axes), axes, [-1] * len(axes)]
        w.add("Slice", [x, *(w.constant(np.array(part, np.int64)) for part in parts)], out)


@handles("fill", "fill_like")
def _fill(w: Any, op: Any, out: str) -> None:
    shape = w.constant(np.array(op.outputs[0].shape, np.int64))
    w.add("Expand", [w.constant(value(op, "value", 0.0)), shape], out)


@handles("concat", "stack")
def _join(w: Any, op: Any, out: str) -> None:
    if bool(value(op, "interleave", False)):
        raise errors.RuntimeFailed(f"coreml: concat {op.name} interleaves, which is not checked here")
    names, axis = [w.ref(var) for var in op.inputs["values"]], int(value(op, "axis"))
    if op.op_type == "stack":
        names = [w.add("Unsqueeze", [name, w.constant(np.array([axis]))]) for name in names]
    w.add("Concat", names, out, axis=axis)


@handles("split")
def _split(w: Any, op: Any, out: str) -> None:
    axis = int(value(op, "axis"))
    sizes = w.constant(np.array([int(var.shape[axis]) for var in op.outputs], np.int64))
    w.add_many("Split", [w.ref(op.inputs["x"]), sizes], [var.name for var in op.outputs], axis=axis)


@handles("crop")
def _crop(w: Any, op: Any, out: str) -> None:
    shape, starts = op.outputs[0].shape, [ints(op, f"crop_{side}")[0] for side in ("height", "width")]
    ends = [start + int(size) for start, size in zip(starts, shape[-2:])]
    parts = (starts, ends, [len(shape) - 2, len(shape) - 1])
    w.add("Slice", [w.ref(op.inputs["x"]), *(w.constant(np.array(part, np.int64)) for part in parts)], out)


@handles("slice_by_index", "slice_by_size")
def _slice(w: Any, op: Any, out: str) -> None:
    x = op.inputs["x"]
    rank, begin = len(x.shape), ints(op, "begin")
    if op.op_type == "slice_by_size":
        steps, end = [1] * rank, [_FAR if s == -1 else b + s for b, s in zip(begin, ints(op, "size"))]
    else:
        steps, end = ints(op, "stride", [1] * rank), ints(op, "end", [0] * rank)
        from_start, to_end, single = (
            [bool(flag) for flag in value(op, name, [False] * rank)]
            for name in ("begin_mask", "end_mask", "squeeze_mask")
        )
        begin = [(0 if s > 0 else _FAR) if skip else b for b, s, skip in zip(begin, steps, from_start)]
        end = [(_FAR if s > 0 else -_FAR) if skip else e for e, s, skip in zip(end, steps, to_end)]
        end = [(b + 1 if b != -1 else _FAR) if one else e for b, e, one in zip(begin, end, single)]
    parts = (begin, end, list(range(rank)), steps)
    cut = w.add("Slice", [w.ref(x), *(w.constant(np.array(part, np.int64)) for part in parts)])
    w.add("Reshape", [cut, w.constant(np.array(op.outputs[0].shape, np.int64))], out)


@handles("gather", "gather_along_axis", "gather_nd")
def _gather(w: Any, op: Any, out: str) -> None:
    x, indices, kind = w.ref(op.inputs["x"]), w.ref(op.inputs["indices"]), op.op_type
    if int(value(op, "batch_dims", 0)):
        raise errors.RuntimeFailed(f"coreml: {kind} {op.name} has batch dimensions, which is not checked here")
    whole = w.add("Cast", [indices], to=7)
    if kind == "gather_nd":
        w.add("GatherND", [x, whole], out)
    else:
        axis = int(value(op, "axis", 0))
        w.add("Gather" if kind == "gather" else "GatherElements", [x, whole], out, axis=axis)
