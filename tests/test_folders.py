"""Model folders of diffusers: the same outputs as diffusers' own; what would compute something else is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from edgegen import loading, samplers  # noqa: E402
from edgegen.errors import ModelError  # noqa: E402
from edgegen.models import _diffusers  # noqa: E402
from edgegen.records import ModelOptions  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # importing diffusers alone takes many seconds

UNET = ("unets.unet_2d", "UNet2DModel", {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4, "attention_head_dim": None, "freq_shift": 1, "flip_sin_to_cos": False,
    "downsample_padding": 0, "norm_eps": 1e-6,
})  # fmt: skip
ADM = ("unets.unet_2d", "UNet2DModel", {
    "sample_size": 16, "in_channels": 3, "out_channels": 6, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet",
})  # fmt: skip
DIT = ("transformers.dit_transformer_2d", "DiTTransformer2DModel", {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 7,
})  # fmt: skip
TINY = ("autoencoders.autoencoder_tiny", "AutoencoderTiny", {
    "encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8), "latent_channels": 4,
    "num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1),
})  # fmt: skip
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
             "num_train_timesteps": 1000, "trained_betas": None, "clip_sample": True}  # fmt: skip


def saved(tmp_path: Path, what: tuple[str, str, dict[str, Any]], scheduler: dict[str, Any] | None = SCHEDULER) -> Any:
    """diffusers' own network with numbers that are drawn, saved as it saves them to tmp_path / "net"."""
    torch.manual_seed(0)
    net = _diffusers.network(*what).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # some start at zero, and would hide what is not connected
            parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(tmp_path / "net")
    if scheduler is not None:
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return net


def changed(tmp_path: Path, **fields: Any) -> None:
    """Other fields in the saved config.json."""
    path = tmp_path / "net" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("what", [UNET, ADM], ids=["ddpm", "adm"])
def test_a_unet_computes_what_diffusers_does(what: tuple[str, str, dict[str, Any]], tmp_path: Path):
    net = saved(tmp_path, what)
    model = loading.load_model("ddpm_unet", weights=tmp_path / "net")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        wanted = net(x, t).sample[:, :3]
        assert torch.equal(model.stage.module(x, t), wanted) and wanted.std() > 1e-2
    settings = samplers.of(model.options)
    assert (settings["prediction"], settings["schedule"], settings["clip"]) == ("epsilon", "linear", 1.0)
    again = loading.load_model("ddpm_unet", options=ModelOptions(config=model.origin["config"]), latency_only=True)
    assert again.stage.inputs[0].shape == (1, 3, 16, 16)  # a bundle makes it anew from its origin


def test_a_transformer_computes_what_diffusers_does(tmp_path: Path):
    net = saved(tmp_path, DIT, {**SCHEDULER, "clip_sample": False})
    # as the published folder has it: the class that it came from, with that one's fields
    changed(tmp_path, _class_name="Transformer2DModel", cross_attention_dim=None, only_cross_attention=False)
    model = loading.load_model("dit", weights=tmp_path / "net")
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1.0, 6.0])
    with torch.no_grad():
        wanted = net(x, t, class_labels=label.long()).sample[:, :4]
        assert torch.equal(model.stage.module(x, t, label), wanted) and wanted.std() > 1e-2
    assert model.options["labels"] == 7 and samplers.of(model.options)["clip"] == 0


def test_a_tiny_autoencoder_decodes_as_diffusers_does(tmp_path: Path):
    net = saved(tmp_path, TINY, None)
    module = loading.load_model("taesd", weights=tmp_path / "net").stage.module
    z = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        wanted = net.decode(z).sample  # -1..1, ours 0..1
        assert torch.allclose(2 * module(z) - 1, wanted, atol=1e-5) and wanted.std() > 1e-2


def test_older_names_of_attention_load(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    net = saved(tmp_path, UNET)
    file = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(file)
    for new, old in older.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    assert any(".query." in name for name in state)
    save_file(state, file, {"format": "pt"})
    module = loading.load_model("ddpm_unet", weights=tmp_path / "net").stage.module
    assert torch.equal(module.net.mid_block.attentions[0].to_q.weight, net.mid_block.attentions[0].to_q.weight)


@pytest.mark.parametrize(("fields", "said"), [
    ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier' there and 'positional' here"),
    ({"add_attention": False}, "add_attention is False there and True here"),
    ({"act_fn": "gelu"}, "act_fn is 'gelu' there and 'silu' here"),
    ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types is"),
    ({"something_new": 3}, "something_new is 3 there and unknown here"),
    ({"_class_name": "UNet2DConditionModel"}, "is of UNet2DConditionModel; this network is diffusers' UNet2DModel"),
    ({"num_class_embeds": 11}, r"num_class_embeds is 11; .* give --config labels=10"),
    ({"in_channels": None}, "a field of UNet2DModel is missing or of another kind"),
])  # fmt: skip
def test_what_would_compute_something_else_is_one_line(fields: dict[str, Any], said: str, tmp_path: Path):
    saved(tmp_path, UNET)
    changed(tmp_path, **fields)
    with pytest.raises(ModelError, match=said) as caught:
        loading.load_model("ddpm_unet", weights=tmp_path / "net")
    assert "\n" not in str(caught.value) and str(tmp_path / "net") in str(caught.value)


def test_a_folder_that_is_none_is_one_line(tmp_path: Path):
    saved(tmp_path, UNET, {**SCHEDULER, "beta_end": 0.012})
    folder, scheduler = tmp_path / "net", tmp_path / "scheduler" / "scheduler_config.json"

    def refused(name: str, said: str) -> None:
        with pytest.raises(ModelError, match=said) as caught:
            loading.load_model(name, weights=folder)
        assert "\n" not in str(caught.value)

    refused("ddpm_unet", r"beta_start, beta_end are 0.0001, 0.012; linear has 0.0001, 0.02")
    scheduler.write_text(json.dumps({"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}))
    refused("ddpm_unet", "prediction_type 'epsilon' with beta_schedule None; known are")
    scheduler.unlink()
    refused("ddpm_unet", "no scheduler_config.json there or in ../scheduler")
    refused("dcgan", "is a folder; dcgan takes a file. Folders of diffusers are for: ddpm_unet, dit, taesd")
    (folder / "config.json").write_text("{")
    refused("ddpm_unet", "damaged or not JSON")
    (folder / "config.json").unlink()
    refused("ddpm_unet", "has no config.json; give the folder of one network, whole")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    refused("ddpm_unet", r"has no diffusion_pytorch_model.safetensors or diffusion_pytorch_model.bin")
