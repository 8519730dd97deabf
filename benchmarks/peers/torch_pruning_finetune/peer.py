"""Torch-Pruning with a plain fine-tune on the calibration images; best: its isomorphic ranking and a longer fine-tune.

The loss is cross entropy where there are labels, else the distance to the unpruned network's outputs.
https://github.com/VainF/Torch-Pruning
"""

RUNS = ("openvino", "onnxruntime")
SETTINGS = {
    "default": {"ratio": 0.5, "isomorphic": False, "steps": 100},
    "best": {"ratio": 0.25, "isomorphic": True, "steps": 400},
}


def compress(source, calibration, out, options):
    """Float32 model.onnx in the folder `out`."""
    # user: begin
    import copy

    import numpy as np
    import torch
    import torch_pruning as tp

    torch.manual_seed(0)
    data = np.load(calibration)
    inputs = [torch.from_numpy(data[name]) for name in source.inputs]
    example = tuple(x[:1] for x in inputs)
    y = torch.from_numpy(data["y"]) if "y" in data else None
    teacher = source.module()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        output = teacher(*example)
    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
    last = [layer for layer in model.modules() if isinstance(layer, kinds)][-1]
    pruner = tp.pruner.MagnitudePruner(
        model, example, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=options["ratio"],
        ignored_layers=[last], round_to=8, global_pruning=options["isomorphic"], isomorphic=options["isomorphic"],
    )  # fmt: skip
    pruner.step()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options["steps"])
    size = 32 if output[0].numel() < 10_000 else 4
    model.train()
    for _ in range(options["steps"]):
        chosen = torch.randint(0, len(inputs[0]), (size,))
        batch = [x[chosen] for x in inputs]
        found = model(*batch)
        if y is not None and output.ndim == 2:
            loss = torch.nn.functional.cross_entropy(found, y[chosen])
        else:
            with torch.no_grad():
                wanted = teacher(*batch)
            loss = torch.nn.functional.mse_loss(found, wanted) / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.onnx.export(
        model.eval(), example, str(out / "model.onnx"), dynamo=True, external_data=False,
        input_names=source.inputs, output_names=["output"],
    )  # fmt: skip
    # user: end
    return {"path": out / "model.onnx"}
