"""litert-torch and ai-edge-quantizer; default: dynamic range, its first recipe; best: static W8A8 with calibration.

https://github.com/google-ai-edge/ai-edge-quantizer
"""

RUNS = ("litert",)
SETTINGS = {"default": {"static": False}, "best": {"static": True}}


def compress(source, calibration, out, options):
    """model.tflite in the folder `out`."""
    # user: begin
    import litert_torch
    import torch
    from ai_edge_quantizer import quantizer, recipe

    samples = source.samples(calibration)
    example = tuple(map(torch.from_numpy, samples[0].values()))
    litert_torch.convert(source.module(), example).export(str(out / "float.tflite"))
    if options["static"]:
        tool = quantizer.Quantizer(str(out / "float.tflite"), recipe.static_wi8_ai8())
        named = [{f"args_{i}": x for i, x in enumerate(sample.values())} for sample in samples]
        ranges = tool.calibrate({"serving_default": named})
        tool.quantize(ranges).export_model(str(out / "model.tflite"))
    else:
        tool = quantizer.Quantizer(str(out / "float.tflite"), recipe.dynamic_wi8_afp32())
        tool.quantize().export_model(str(out / "model.tflite"))
    # user: end
    return {"path": out / "model.tflite"}
