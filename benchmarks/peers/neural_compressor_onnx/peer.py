"""Intel Neural Compressor, what is left of it for ONNX (onnx-neural-compressor 1.0); best: Q/DQ per channel.

https://github.com/onnx/neural-compressor
"""

RUNS = ("onnxruntime", "openvino")
SETTINGS = {"default": {}, "best": {"per_channel": True, "qdq": True}}


def compress(source, calibration, out, options):
    """model.onnx in the folder `out`."""
    # user: begin
    from onnx_neural_compressor.quantization import QuantFormat, config, quantize

    class Reader:
        def __init__(self):
            self.data = source.samples(calibration)
            self.rewind()

        def get_next(self):
            return next(self.samples, None)

        def rewind(self):
            self.samples = iter(self.data)

        def __iter__(self):
            return iter(self.get_next, None)

    more = {"per_channel": True, "quant_format": QuantFormat.QDQ} if options else {}
    reader = Reader()
    settings = config.StaticQuantConfig(
        calibration_data_reader=reader, calibration_sampling_size=len(reader.data), **more
    )
    quantize(str(source.onnx), str(out / "model.onnx"), settings)
    # user: end
    return {"path": out / "model.onnx"}
