"""The named configurations give the published grids, widths and depths."""

import dataclasses

import pytest
import torch
from transformers import SiglipModel

from megadual.vision import DualToken, DualTokenConfig, StreamConfig
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
    for stream in config.code_streams:
        sizes = (config.image_size, config.grid[0], config.hidden_size, stream.code_dim, stream.depth)
        assert sizes == PUBLISHED[name] and stream.codebook_size == 16384
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_preset_builds_in_the_published_layout(name):
    config = preset(name)
    with torch.device("meta"):
        model = DualToken(config)
    state, hidden, semantic = model.state_dict(), config.hidden_size, config.code_streams[0]
    dim = semantic.code_dim
    shapes = {
        f"quantizers.semantic.codebooks.{semantic.depth - 1}.weight": (16385, dim),
        "prequant.pixel.0.attn.qkv.weight": (3 * hidden, hidden),
        "postquant.semantic.teacher.attn.qkv.weight": (3 * hidden, dim),
        "decoder.conv_in.weight": (1024, 1024, 3, 3),
        f"siglip_model.vision_model.encoder.layers.{config.vision['num_hidden_layers'] - 1}.mlp.fc1.weight": (
            config.vision["intermediate_size"],
            hidden,
        ),
    }
    assert {key: state[key].shape for key in shapes} == shapes
    assert any(key.startswith("prequant.pixel.1.") for key in state) == (dim == 32)
    assert config.output_size == config.image_size


CHANGES = {
    "siglip": PRESETS["siglip2-so400m-256-d8"]["siglip"], "postquant_causal": False, "decoder_latent": 8,
    "decoder_in_channels": 64, "decoder_channels": 64, "decoder_multipliers": [1, 2], "decoder_res_blocks": 1,
    "decoder_attention": [32], "decoder_norm_groups": 16,
}  # fmt: skip
STREAM_CHANGES = {
    "layers": [3, 5], "weights": [0.2, 0.1], "feeds": ["picture"], "depth": 3, "codebook_size": 8, "code_dim": 16,
    "shared_codebook": False, "timing": "per_step", "decay": 0.9, "restart_unused_codes": False,
}  # fmt: skip


def test_any_field_can_be_changed():
    assert set(CHANGES) | {"streams"} == {field.name for field in dataclasses.fields(DualTokenConfig)}
    assert set(STREAM_CHANGES) == {field.name for field in dataclasses.fields(StreamConfig)}
    with torch.device("meta"):
        backbone = SiglipModel(preset("siglip2-so400m-256-rvq4").siglip_config())
        for name, value in CHANGES.items():
            config = preset("siglip2-so400m-256-rvq4", **{name: value})
            assert getattr(config, name) == value
            DualToken(config, siglip_model=backbone)
        for name, value in STREAM_CHANGES.items():
            config = preset("siglip2-so400m-256-rvq4", streams={"pixel": {name: value}})
            assert getattr(config.streams["pixel"], name) == value
            assert config.streams["semantic"] == PRESETS["siglip2-so400m-256-rvq4"]["streams"]["semantic"]
            DualToken(config, siglip_model=backbone)
    with pytest.raises(ValueError, match=r"'semantic' reads the layers \[25\]; each must be 1 to 24"):
        preset("siglip-l-256-d4", streams={"semantic": {"layers": [25]}})
    with pytest.raises(ValueError, match="no DualToken preset 'so400m'; there are siglip2-so400m-256-rvq4"):
        preset("so400m")
