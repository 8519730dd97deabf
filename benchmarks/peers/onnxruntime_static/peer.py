"""ONNX Runtime's static quantization; best: its documented choice for CPUs with VNNI, per channel after preprocessing.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

RUNS = ("onnxruntime", "openvino")
SETTINGS = {"default": {"per_channel": False, "prepare": False}, "best": {"per_channel": True, "prepare": True}}


def compress(source, calibration, out, options):
    """Q/DQ model.onnx in the folder `out`."""
    # user: begin
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.samples = iter(source.samples(calibration))

        def get_next(self):
            return next(self.samples, None)

    model = str(source.onnx)
    if options["prepare"]:
        quant_pre_process(model, str(out / "prepared.onnx"), skip_symbolic_shape=True)
        model = str(out / "prepared.onnx")
    quantize_static(model, str(out / "model.onnx"), Reader(), per_channel=options["per_channel"])
    # user: end
    return {"path": out / "model.onnx"}
