"""What the import does with files that do not fit, and where SigLIP's sizes come from."""

import json

import pytest
import torch
from dualtoken_reference import published_config, random_weights, siglip
from transformers import SiglipConfig, SiglipModel

from checkpoints_tools.import_dualtoken import main
from megadual.vision import DualToken
from megadual.vision.presets import PRESETS, siglip_from_shapes

DECODER = {"decoder_in_channels": 32, "ch_mult": [1, 1], "num_res_blocks": 0, "attn_resolutions": []}
BACKBONE = siglip(image_size=16, patch_size=2, hidden=32, layers=3)


@pytest.fixture
def run(tmp_path):
    """run(state, config, with_siglip) writes the authors' files and calls the command; the folder as attribute."""
    original = published_config(BACKBONE, (16, 8, 2), (16, 8, 2), DECODER, layers=(1, 2, 1), latent=[8, 8])

    def call(change=lambda state, config: None, with_siglip=True):
        config, state = json.loads(json.dumps(original)), random_weights(original, BACKBONE)
        change(state, config["rqvaesiglip"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save({"epoch": 1, "optimizer": {}, "state_dict": state}, tmp_path / "weights.pt")
        BACKBONE.save_pretrained(tmp_path / "siglip")
        words = [
            "--config",
            tmp_path / "config.json",
            "--weights",
            tmp_path / "weights.pt",
            "--output",
            tmp_path / "out",
        ]
        main([str(word) for word in words + (["--siglip", tmp_path / "siglip"] if with_siglip else [])])

    call.folder = tmp_path
    return call


def refused(run, capsys, change, **options):
    with pytest.raises(SystemExit) as stopped:
        run(change, **options)
    assert stopped.value.code == 2 and not (run.folder / "out").exists()
    return capsys.readouterr().err


def test_every_tensor_that_does_not_fit_is_named(run, capsys):
    def change(state, config):
        del state["decoder.conv_out.bias"]
        state["prequant_sem.extra"] = torch.zeros(2)
        state["postquant_pix.proj.weight"] = torch.zeros(32, 9)

    message = refused(run, capsys, change)
    assert "3 tensors differ" in message
    assert "missing: decoder.conv_out.bias (3,)" in message
    assert "without a place: prequant_sem.extra (2,)" in message
    assert "misshapen: postquant_pix.proj.weight is (32, 9), the config makes it (32, 8)" in message


def test_position_ids_and_what_lies_beside_the_weights_are_reported_as_ignored(run, capsys):
    name = "siglip_model.vision_model.embeddings.position_ids"
    run(lambda state, config: state.update({name: torch.arange(64)[None]}))
    printed = capsys.readouterr().out
    assert f"ignored tensors: {name}\n" in printed and "ignored beside the state dict: epoch, optimizer" in printed
    DualToken.from_pretrained(run.folder / "out")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s, c: c.pop("vq_sem"), "'rqvaesiglip' has no 'vq_sem'"),
        (lambda s, c: c["ddconfig"].pop("resolution"), "'ddconfig' has no 'resolution'"),
        (lambda s, c: s.update(epoch=3), "holds no state dict"),
        (lambda s, c: c["vq_pix"].update(code_shape=[4, 4, 2]), "vq_pix has code_shape [4, 4, 2]"),
        (lambda s, c: c["vq_pix"].update(bottleneck_type="vq"), "vq_pix.bottleneck_type is 'vq'"),
        (lambda s, c: c["ddconfig"].update(give_pre_end=True), "ddconfig.give_pre_end is True"),
        (lambda s, c: c.update(decoder_latent_shape=[8, 4]), "decoder_latent_shape [8, 4] is not square"),
        (lambda s, c: c.update(layer_sem=4), "stream 'semantic' reads the layers [4]; each must be 1 to 3"),
        (lambda s, c: c.update(hidden_size=64), "hidden_size 64 != SigLIP's 32"),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused(run, capsys, change, words):
    assert words in refused(run, capsys, change)


def test_siglip_sizes_come_from_the_folder_that_the_config_names(run):
    run(lambda state, config: config.update(pretrained_model=str(run.folder / "siglip")), with_siglip=False)
    assert DualToken.from_pretrained(run.folder / "out").config.vision["num_attention_heads"] == 2


def test_without_a_folder_an_unknown_width_is_refused(run, capsys):
    message = refused(run, capsys, lambda state, config: None, with_siglip=False)
    assert "attention heads of a tower of width 32" in message and "--siglip FOLDER" in message


@pytest.mark.parametrize("name", PRESETS)
def test_the_shapes_of_published_backbones_tell_their_sizes(name):
    expected = PRESETS[name]["siglip"]
    with torch.device("meta"):
        model = SiglipModel(SiglipConfig.from_dict(expected))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert siglip_from_shapes(shapes, expected["vision_config"]["image_size"]) == expected
