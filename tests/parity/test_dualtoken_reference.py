"""Random weights in the authors' two files, imported by the command, against the plain reference."""

import json

import pytest
import torch
from dualtoken_reference import Reference, published_config, random_weights, siglip

from checkpoints_tools.import_dualtoken import main
from megadual.vision import DualToken
from megadual.vision.fast import FastDualToken

DEEP = {"decoder_in_channels": 64, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [4]}
FLAT = {"decoder_in_channels": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [8, 16]}


def released_256():
    """In small: patches of 16, as many positions as the decoder's latent has."""
    backbone = siglip(image_size=64, patch_size=16, hidden=64, layers=4)
    return backbone, published_config(backbone, (128, 16, 4), (128, 16, 4), DEEP, layers=(2, 3, 1), latent=[4, 4])


def released_384():
    """In small: an odd grid that does not cover the image, resized to the latent; eight codes."""
    backbone = siglip(image_size=64, patch_size=9, hidden=96, layers=5, heads=3)
    return backbone, published_config(backbone, (256, 32, 8), (256, 32, 8), DEEP, layers=(2, 4, 1), latent=[4, 4])


def wide_codes():
    """Codes of hidden width, a codebook for each depth, no shortcut, no layer behind the semantic one."""
    backbone = siglip(image_size=32, patch_size=4, hidden=64, layers=3)
    return backbone, published_config(backbone, (64, 64, 3), (64, 64, 3), FLAT, layers=(1, 3, None), shared=False)


def unequal_streams():
    """Sizes of its own for each stream, a shortcut deeper than the pixel layer, attention by a resolution that lies."""
    backbone = siglip(image_size=32, patch_size=8, hidden=96, layers=4, heads=4)
    return backbone, published_config(
        backbone, (64, 48, 2), (96, 16, 5), FLAT, layers=(1, 3, 2), latent=[8, 8], weight=-0.3, resolution=64
    )


CASES = [released_256, released_384, wide_codes, unequal_streams]


def write(folder, backbone, config, state):
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, folder / "weights.pt")
    backbone.save_pretrained(folder / "siglip")
    names = {"config": "config.json", "weights": "weights.pt", "siglip": "siglip", "output": "out"}
    return [word for option, name in names.items() for word in (f"--{option}", str(folder / name))]


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_imported_weights_compute_what_the_reference_does(case, tmp_path):
    backbone, config = case()
    state = random_weights(config, backbone)
    main(write(tmp_path, backbone, config, {f"module.{name}": x for name, x in state.items()}))
    model = DualToken.from_pretrained(tmp_path / "out")
    side = backbone.vision_config.image_size
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = Reference(config, backbone, state)(images)

    # A norm's epsilon ten times too large moves the pooled output by 3e-6 and the decoded one by 2e-5. The fast path
    # sums in another order.
    for one, tolerance in ((model, (2e-6, 1.5e-5)), (FastDualToken(model, torch.float32), (1e-4, 1e-4))):
        encoded = one.encode(images)
        for stream in ("semantic", "pixel"):
            ours, theirs = encoded.codes[stream], getattr(expected, stream)
            assert len(theirs.unique()) > 20, "the case tells little: few codes are used"
            assert (ours[..., 0] == theirs[..., 0]).float().mean() >= 0.999
            assert (ours == theirs).float().mean() >= 0.99
        assert distance(encoded.pooled, expected.pooled) < tolerance[0]
        decoded = one.decode({"pixel": expected.pixel})
        assert decoded.std() > 0.05 and distance(decoded, expected.reconstruction.clamp(-1, 1)) < tolerance[1]
