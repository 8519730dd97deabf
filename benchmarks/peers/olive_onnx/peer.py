"""Olive's OnnxStaticQuantization on the CPU; best: per channel, in the Q/DQ format, after its graph optimization.

https://microsoft.github.io/Olive/features/quantization.html
"""

RUNS = ("onnxruntime", "openvino")
SETTINGS = {
    "default": {"passes": {"quantize": {}}},
    "best": {"passes": {"peephole": {"type": "OnnxPeepholeOptimizer"},
                        "quantize": {"quant_format": "QDQ", "per_channel": True}}},
}  # fmt: skip


def compress(source, calibration, out, options):
    """model.onnx in the folder `out`."""
    # user: begin
    import olive
    from olive.data.registry import Registry

    class Images:
        def __init__(self):
            self.samples = source.samples(calibration)

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            return {name: array[0] for name, array in self.samples[index].items()}, 0

    Registry.register_dataset("calibration_images")(lambda **_: Images())
    quantize = {"type": "OnnxStaticQuantization", "data_config": "images", **options["passes"]["quantize"]}
    result = olive.run({
        "input_model": {"type": "ONNXModel", "model_path": str(source.onnx)},
        "data_configs": [{"name": "images", "type": "DataContainer",
                          "load_dataset_config": {"type": "calibration_images"},
                          "pre_process_data_config": {"type": "skip_pre_process"},
                          "post_process_data_config": {"type": "skip_post_process"},
                          "dataloader_config": {"type": "default_dataloader", "batch_size": 1}}],
        "passes": {**options["passes"], "quantize": quantize},
        "output_dir": str(out / "olive"), "cache_dir": str(out / "cache"),
    })  # fmt: skip
    # user: end
    if not result.has_output_model():
        raise RuntimeError("Olive ended without a model")
    return {"path": result.get_best_candidate().model_path}
