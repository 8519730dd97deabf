"""The files a user makes by hand for one network: ONNX, ONNX Runtime static INT8, OpenVINO, NNCF on OpenVINO."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS = (
    "openvino bf16",
    "openvino fp32",
    "openvino int8 nncf",
    "onnxruntime fp32",
    "onnxruntime int8 u8s8",
    "onnxruntime int8 s8s8",
)
BASELINE = VARIANTS[0]
INPUT = "input"


def export(module: Any, example: np.ndarray, path: Path) -> None:
    """ONNX with static shapes, opset 18, input named "input"."""
    import torch

    x = torch.from_numpy(example)
    program = torch.onnx.export(
        module, (x,), dynamo=True, input_names=[INPUT], output_names=["output"], opset_version=18, verbose=False
    )
    program.save(str(path), external_data=False)


def build(variant: str, onnx: Path, calibration: np.ndarray, out: Path) -> dict[str, Any]:
    """Build one variant into the folder `out`, whole or not at all.

    Returns:
        {"runtime", "path", "precision", "size_bytes"} as the worker takes it.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    partial.mkdir(parents=True)
    runtime, precision = variant.split(" ", 1)
    if runtime == "openvino":
        name = _openvino(precision, onnx, calibration, partial)
    else:
        name = _onnxruntime(precision, onnx, calibration, partial)
    partial.rename(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    return {"runtime": runtime, "path": str(out / name), "precision": precision, "size_bytes": size}


def _openvino(precision: str, onnx: Path, calibration: np.ndarray, out: Path) -> str:
    """fp32 stores FP32; bf16 stores FP16, as `openvino.save_model` does by default; nncf: `nncf.quantize` defaults."""
    os.environ.setdefault("CI", "true")  # the one switch by environment that openvino_telemetry obeys: send nothing
    import openvino

    model = openvino.convert_model(onnx)
    if precision == "int8 nncf":
        import nncf

        dataset = nncf.Dataset([x[None] for x in calibration])
        model = nncf.quantize(model, dataset, subset_size=len(calibration))
    openvino.save_model(model, out / "model.xml", compress_to_fp16=precision != "fp32")
    return "model.xml"


def _onnxruntime(precision: str, onnx: Path, calibration: np.ndarray, out: Path) -> str:
    """Static Q/DQ per channel after `quant_pre_process`; s8s8 is symmetric, as TensorRT wants it."""
    if precision == "fp32":
        shutil.copyfile(onnx, out / "model.onnx")
        return "model.onnx"
    from onnxruntime import quantization as ort_quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(ort_quantization.CalibrationDataReader):
        """The calibration images, one a step."""

        def __init__(self) -> None:
            self.images: Iterator[np.ndarray] = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image[None]}

    prepared = out / "prepared.onnx"
    quant_pre_process(str(onnx), str(prepared), skip_symbolic_shape=True)
    signed = precision == "int8 s8s8"
    ort_quantization.quantize_static(
        str(prepared),
        str(out / "model.onnx"),
        Reader(),
        quant_format=ort_quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=ort_quantization.QuantType.QInt8 if signed else ort_quantization.QuantType.QUInt8,
        weight_type=ort_quantization.QuantType.QInt8,
        extra_options={"ActivationSymmetric": signed, "WeightSymmetric": True},
    )
    prepared.unlink()
    return "model.onnx"
