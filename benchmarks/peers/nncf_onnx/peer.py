"""NNCF on the ONNX file; best: its documented settings for accuracy (mixed preset, transformers told).

Not full bias correction: nncf 3.4 ends with it on ResNet-20 ("Failed to find node output or a constant initializer").
https://docs.openvino.ai/2025/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html
"""

RUNS = ("onnxruntime", "openvino")
SETTINGS = {"default": {"accurate": False}, "best": {"accurate": True}}


def compress(source, calibration, out, options):
    """Q/DQ model.onnx in the folder `out`."""
    # user: begin
    import nncf
    import onnx

    samples = source.samples(calibration)
    model = onnx.load(source.onnx)
    more = {}
    if options["accurate"]:
        more = {"preset": nncf.QuantizationPreset.MIXED}
        if any(node.op_type == "Softmax" for node in model.graph.node):
            more["model_type"] = nncf.ModelType.TRANSFORMER
    onnx.save(nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples), **more), out / "model.onnx")
    # user: end
    return {"path": out / "model.onnx"}
