"""litert-torch and ai-edge-quantizer; default: dynamic range, its first recipe; best: static W8A8 with calibration.

https://github.com/google-ai-edge/ai-edge-quantizer
"""

RUNS = ("litert",)
SETTINGS = {"default": {"static": False}, "best": {"static": True}}


def compress(source, calibration, out, options):
    """model.tflite in the folder `out`."""
    # user: begin
    import litert_torch
    import numpy as np
    import torch
    from ai_edge_quantizer import quantizer, recipe

    images = np.load(calibration)["x"]
    litert_torch.convert(source.module(), (torch.from_numpy(images[:1]),)).export(str(out / "float.tflite"))
    if options["static"]:
        tool = quantizer.Quantizer(str(out / "float.tflite"), recipe.static_wi8_ai8())
        ranges = tool.calibrate({"serving_default": [{"args_0": x[None]} for x in images]})
        tool.quantize(ranges).export_model(str(out / "model.tflite"))
    else:
        tool = quantizer.Quantizer(str(out / "float.tflite"), recipe.dynamic_wi8_afp32())
        tool.quantize().export_model(str(out / "model.tflite"))
    # user: end
    return {"path": out / "model.tflite"}
