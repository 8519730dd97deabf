"""NVIDIA ModelOpt's ONNX post-training quantization, on the CPU; best: max calibration with FP32 for the rest.

ModelOpt writes signed symmetric Q/DQ for TensorRT (and FP16 for the rest by default); here it runs where all others do.
https://nvidia.github.io/Model-Optimizer/guides/_onnx_quantization.html
"""

RUNS = ("onnxruntime", "openvino")
SETTINGS = {"default": {}, "best": {"calibration_method": "max", "high_precision_dtype": "fp32"}}


def compress(source, calibration, out, options):
    """Q/DQ model.onnx in the folder `out`."""
    # user: begin
    import numpy as np
    from modelopt.onnx.quantization import quantize

    samples = source.samples(calibration)
    arrays = {name: np.concatenate([sample[name] for sample in samples]) for name in source.inputs}
    quantize(str(source.onnx), "int8", arrays, calibration_eps=["cpu"], output_path=str(out / "model.onnx"), **options)
    # user: end
    return {"path": out / "model.onnx"}
