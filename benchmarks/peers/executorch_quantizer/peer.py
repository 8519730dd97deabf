"""ExecuTorch's XNNPACK quantizer (pt2e); default: its example's settings; best: per channel.

https://docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-quantization.html
"""

RUNS = ("executorch",)
SETTINGS = {"default": {"is_per_channel": False}, "best": {"is_per_channel": True}}


def compress(source, calibration, out, options):
    """model.pte in the folder `out`."""
    # user: begin
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    samples = [tuple(map(torch.from_numpy, sample.values())) for sample in source.samples(calibration)]
    example = samples[0]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**options))
    prepared = prepare_pt2e(torch.export.export(source.module(), example).module(), quantizer)
    with torch.no_grad():
        for sample in samples:
            prepared(*sample)
    exported = torch.export.export(convert_pt2e(prepared), example)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    (out / "model.pte").write_bytes(lowered.to_executorch().buffer)
    # user: end
    return {"path": out / "model.pte"}
