"""The named configurations give the published grids, widths and depths."""

import dataclasses

import pytest
import torch
from transformers import SiglipModel

from megadual.vision import DualToken, DualTokenConfig
from megadual.vision.presets import PRESETS, preset

PUBLISHED = {  # image size, positions per side, hidden width, code width, depth
    "siglip2-so400m-256-rvq4": (256, 16, 1152, 32, 4),
    "siglip2-so400m-384-rvq8": (384, 27, 1152, 32, 8),
    "siglip-l-256-d4": (256, 16, 1024, 1024, 4),
    "siglip-so400m-384-d8": (384, 27, 1152, 1152, 8),
    "siglip2-so400m-256-d8": (256, 16, 1152, 1152, 8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(name):
    config = preset(name)
    sizes = (config.image_size, config.grid[0], config.hidden_size, config.code_dim, config.depth)
    assert sizes == PUBLISHED[name]
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_preset_builds_in_the_published_layout(name):
    config = preset(name)
    with torch.device("meta"):
        model = DualToken(config)
    state, hidden, dim = model.state_dict(), config.hidden_size, config.code_dim
    shapes = {
        f"quantizer_sem.codebooks.{config.depth - 1}.weight": (16385, dim),
        "prequant_pix.attn.qkv.weight": (3 * hidden, hidden),
        "postquant_sem.attn.qkv.weight": (3 * hidden, dim),
        "decoder.conv_in.weight": (1024, 1024, 3, 3),
        f"siglip_model.vision_model.encoder.layers.{config.vision['num_hidden_layers'] - 1}.mlp.fc1.weight": (
            config.vision["intermediate_size"],
            hidden,
        ),
    }
    assert {key: state[key].shape for key in shapes} == shapes
    assert any(key.startswith("prequant_shortcut") for key in state) == (dim == 32)
    assert config.output_size == config.image_size


CHANGES = {
    "siglip": PRESETS["siglip2-so400m-256-d8"]["siglip"], "layer_shortcut": 3, "layer_recon": 5, "layer_sem": 20,
    "weight_shortcut": 0.1, "codebook_size": 64, "code_dim": 64, "depth": 2, "shared_codebook": False,
    "pixel_codebook_size": 8, "pixel_code_dim": 16, "pixel_depth": 3, "pixel_shared_codebook": False, "decay": 0.9,
    "restart_unused_codes": False, "timing_semantic": "per_depth", "timing_pixel": "per_step",
    "postquant_causal": False, "decoder_latent": 8, "decoder_in_channels": 64, "decoder_channels": 64,
    "decoder_multipliers": [1, 2], "decoder_res_blocks": 1, "decoder_attention": [32], "decoder_norm_groups": 16,
}  # fmt: skip


def test_any_field_can_be_changed():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(DualTokenConfig)}
    with torch.device("meta"):
        backbone = SiglipModel(preset("siglip2-so400m-256-rvq4").siglip_config())
        for name, value in CHANGES.items():
            config = preset("siglip2-so400m-256-rvq4", **{name: value})
            assert getattr(config, name) == value
            DualToken(config, siglip_model=backbone)
    with pytest.raises(ValueError, match=r"layer_sem\(25\) <= num_hidden_layers\(24\)"):
        preset("siglip-l-256-d4", layer_sem=25)
    with pytest.raises(ValueError, match="no DualToken preset 'so400m'; there are siglip2-so400m-256-rvq4"):
        preset("so400m")
