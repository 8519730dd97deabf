"""coremltools.optimize on the weights: default INT8 per channel; best: 6-bit palettes, its advice for size.

Core ML does not run here: size and output error only. `twin` is the torch network with the compressed weights, as ONNX.
https://apple.github.io/coremltools/docs-guides/source/opt-overview.html
"""

RUNS = ()
SETTINGS = {"default": {"palette": 0}, "best": {"palette": 6}}


def compress(source, calibration, out, options):
    """model.mlpackage and twin.onnx in the folder `out`."""
    # user: begin
    import coremltools as ct
    import torch
    from coremltools.optimize.torch import palettization, quantization

    sample = {name: torch.from_numpy(array) for name, array in source.samples(calibration)[0].items()}
    given = tuple(sample.values())
    if options["palette"]:
        settings = palettization.PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 6}})
        model = palettization.PostTrainingPalettizer(source.module(), settings).compress()
    else:
        settings = quantization.PostTrainingQuantizerConfig.from_dict({"global_config": {"weight_dtype": "int8"}})
        model = quantization.PostTrainingQuantizer(source.module(), settings).compress()
    traced = torch.jit.trace(model.eval(), given)
    types = [ct.TensorType(name, x.shape) for name, x in sample.items()]
    package = ct.convert(traced, inputs=types, minimum_deployment_target=ct.target.iOS18)
    package.save(str(out / "model.mlpackage"))
    # user: end
    torch.onnx.export(
        model, given, str(out / "twin.onnx"), dynamo=True, external_data=False, input_names=source.inputs,
        output_names=["output"],
    )  # fmt: skip
    return {"path": out / "model.mlpackage", "twin": str(out / "twin.onnx")}
