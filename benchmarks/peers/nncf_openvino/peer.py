"""NNCF on OpenVINO; best: its documented settings for accuracy (mixed preset, full bias correction, transformers told).

https://docs.openvino.ai/2025/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html
"""

RUNS = ("openvino",)
SETTINGS = {"default": {"accurate": False}, "best": {"accurate": True}}


def compress(source, calibration, out, options):
    """model.xml and model.bin in the folder `out`."""
    # user: begin
    import nncf
    import openvino

    samples = source.samples(calibration)
    model = openvino.convert_model(source.onnx)
    more = {}
    if options["accurate"]:
        more = {"preset": nncf.QuantizationPreset.MIXED, "fast_bias_correction": False}
        if any(op.get_type_name() == "Softmax" for op in model.get_ops()):
            more["model_type"] = nncf.ModelType.TRANSFORMER
    model = nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples), **more)
    openvino.save_model(model, out / "model.xml")
    # user: end
    return {"path": out / "model.xml"}
