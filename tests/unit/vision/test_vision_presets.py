"""The named configurations give the published grids, widths and depths."""

import pytest
import torch

from megadual.vision import DualToken
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


def test_a_released_model_has_the_published_layout():
    with torch.device("meta"):
        model = DualToken(preset("siglip2-so400m-384-rvq8"))
    state = model.state_dict()
    assert state["quantizer_sem.codebooks.7.weight"].shape == (16385, 32)
    assert state["prequant_pix.attn.qkv.weight"].shape == (3456, 1152)
    assert state["postquant_sem.attn.qkv.weight"].shape == (3456, 32)
    assert state["siglip_model.vision_model.encoder.layers.26.mlp.fc1.weight"].shape == (4304, 1152)


def test_fields_can_be_changed_and_are_checked():
    assert preset("siglip2-so400m-256-rvq4", depth=2).depth == 2
    with pytest.raises(ValueError, match="decoder_latent"):
        preset("siglip2-so400m-256-rvq4", decoder_latent=24)
    with pytest.raises(ValueError, match="no DualToken preset 'so400m'; there are siglip2-so400m-256-rvq4"):
        preset("so400m")
