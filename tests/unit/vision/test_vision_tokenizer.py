"""The whole tokenizer: shapes, consistency, storage, what each path runs through."""

import base64
import dataclasses
import io
import json
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipModel, configuration_utils

from data_pipeline.config import EncodeConfig, FilterConfig
from data_pipeline.decode import decode
from data_pipeline.documents import RawDocument, RawImage, RawTurn
from megadual.hf.processing_megadual import MegaDualProcessor
from megadual.streams import Role, Stream
from megadual.testing.vision import tiny_dualtoken, tiny_dualtoken_config, tiny_siglip_config, write_tiny_siglip
from megadual.text import train_text_tokenizer
from megadual.vision import DualToken, DualTokenConfig, StreamConfig, read_codebooks
from megadual.vision.data import random_crop, read_pairs
from megadual.vision.eval.samples import SampleReader
from megadual.vision.fast import FastDualToken
from megadual.vision.losses import distillation
from megadual.vision.siglip import load_siglip
from megadual.vision.tokenizer import centre_crop, finish, hidden_states, to_tensor


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shapes_and_ranges(images):
    model = tiny_dualtoken()
    encoded = model.encode(images)
    assert list(encoded.codes) == ["semantic", "pixel"]
    for codes in encoded.codes.values():
        assert codes.shape == (2, 4, 4, 3) and codes.dtype == torch.int64
        assert 0 <= codes.min() and codes.max() < 32
    assert encoded.pooled.shape == (2, 32)
    decoded = model.decode(encoded.codes)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    assert model.codebook("pixel").shape == (32, 8)


def test_embed_is_the_sum_of_code_vectors(images):
    model = tiny_dualtoken()
    codes = model.encode(images).codes["semantic"]
    book = model.codebook("semantic")
    torch.testing.assert_close(model.embed(codes, "semantic"), sum(book[codes[..., d]] for d in range(3)))


def test_decode_of_codes_equals_the_reconstruction_of_forward(images):
    model = tiny_dualtoken()
    with torch.no_grad():
        output = model(images)
    torch.testing.assert_close(
        model.decode({"pixel": output.codes["pixel"].unflatten(1, (4, 4))}), output.reconstruction.clamp(-1, 1)
    )


def test_save_and_load_bitwise(images, tmp_path):
    model = tiny_dualtoken()
    model.train()(images)  # codebooks and their statistics away from the start
    model.eval().save_pretrained(tmp_path)
    loaded = DualToken.from_pretrained(tmp_path)
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    one, two = model.encode(images), loaded.encode(images)
    assert torch.equal(one.codes["pixel"], two.codes["pixel"]) and torch.equal(one.pooled, two.pooled)
    books = read_codebooks(tmp_path)
    for stream in books.streams:
        assert (stream.depth, stream.codebook_size, stream.code_dim) == (3, 32, 8)
        assert torch.equal(books.vectors[stream.name], model.codebook(stream.name))
    assert books.fingerprint == model.fingerprint() == loaded.fingerprint()
    assert (books.grid, books.picture) == ((4, 4), ["pixel"])


VARIANTS = {  # the paper's ablation, and one more: streams are what the config says
    "a: one codebook for both goals": {"both": {"layers": [2], "feeds": ["teacher", "picture"]}},
    "b: pixels from the deep layer": {"pixel": {"layers": [2], "feeds": ["picture"]}},
    "c: pixels from a shallow layer": {"pixel": {"layers": [1], "feeds": ["picture"]}},
    "d: dual": {"semantic": {"layers": [2], "feeds": ["teacher"]}, "pixel": {"layers": [1], "feeds": ["picture"]}},
    "meaning alone": {"semantic": {"layers": [2], "feeds": ["teacher"]}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_configs_of_one_class(images, name, tmp_path):
    sizes = {"depth": 2, "codebook_size": 16, "code_dim": 8}
    streams = {stream: StreamConfig(**fields, **sizes) for stream, fields in VARIANTS[name].items()}
    config = dataclasses.replace(tiny_dualtoken_config(), streams=streams)
    torch.manual_seed(0)
    model = DualToken(config).train()
    output = model(images)
    taught, drawn = name[0] in "adm", name != "meaning alone"
    assert (output.pooled is not None, output.reconstruction is not None) == (taught, drawn)
    terms = distillation(output, images, torch.zeros(2, 16, 32), torch.zeros(2, 32))
    sum(terms.values()).backward()
    assert ("pooled_cos" in terms, "reconstruction" in terms) == (taught, drawn)
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, "every parameter that is trained has a gradient, else DistributedDataParallel waits for it"
    model.eval().save_pretrained(tmp_path)
    loaded = DualToken.from_pretrained(tmp_path)
    encoded, fast = loaded.encode(images), FastDualToken(loaded, torch.float32)
    for stream, codes in fast.encode(images).codes.items():
        assert torch.equal(codes, encoded.codes[stream]) and torch.equal(codes, model.encode(images).codes[stream])
    if drawn:
        torch.testing.assert_close(fast.decode(encoded.codes), loaded.decode(encoded.codes), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="no stream of this DualToken feeds a picture decoder"):
            loaded.decode(encoded.codes)


def test_fingerprint_follows_codebooks_and_the_fields_that_define_codes(images):
    model = tiny_dualtoken()
    before = model.fingerprint()
    with torch.no_grad():
        model.decoder.conv_out.weight += 1
    assert model.fingerprint() == before
    with torch.no_grad():
        model.codebook("pixel")[3, 0] += 1e-3
    assert model.fingerprint() != before
    assert (
        tiny_dualtoken().fingerprint()
        == before
        != tiny_dualtoken(streams={"pixel": {"weights": [1.0, 0.5]}}).fingerprint()
    )


def test_the_semantic_path_runs_through_the_last_layer(images):
    model = tiny_dualtoken()
    before = model.encode(images)
    last = model.siglip_model.vision_model.encoder.layers[-1]
    with torch.no_grad():
        last.mlp.fc2.bias += torch.linspace(-1, 1, 32)
    after = model.encode(images)
    assert torch.equal(before.codes["semantic"], after.codes["semantic"])
    assert not torch.allclose(before.pooled, after.pooled)
    model(images).pooled.sum().backward()
    assert last.mlp.fc1.weight.grad.abs().sum() > 0


def test_pixel_codes_depend_on_shallow_layers_only(images):
    model = tiny_dualtoken()
    before = model.encode(images)
    with torch.no_grad():
        model.siglip_model.vision_model.encoder.layers[1].mlp.fc2.bias += torch.linspace(-1, 1, 32)
    after = model.encode(images)
    assert torch.equal(before.codes["pixel"], after.codes["pixel"])
    assert not torch.equal(before.codes["semantic"], after.codes["semantic"])


def test_reconstruction_reaches_the_encoder_and_the_text_tower_is_frozen(images):
    model = tiny_dualtoken().train()
    model(images).reconstruction.square().mean().backward()
    assert model.siglip_model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in model.siglip_model.text_model.parameters())


def test_causal_post_projection_does_not_look_ahead(images):
    model = tiny_dualtoken()
    x = torch.randn(1, 16, 8)
    changed = x.clone()
    changed[:, 10:] = torch.randn(1, 6, 8)
    project = model.postquant["pixel"]["picture"]
    torch.testing.assert_close(project(x)[:, :10], project(changed)[:, :10])
    assert not torch.allclose(project(x)[:, 10:], project(changed)[:, 10:])


def test_unquantised_layers_equal_the_siglip_they_came_from(images):
    torch.manual_seed(3)
    siglip = SiglipModel(tiny_siglip_config()).eval()
    model = DualToken(tiny_dualtoken_config(), siglip_model=siglip)
    with torch.no_grad():
        expected = siglip.vision_model(images, output_hidden_states=True)
        vision = model.siglip_model.vision_model
        states = hidden_states(vision, images, 2)
        torch.testing.assert_close(states[-1], expected.hidden_states[2])
        torch.testing.assert_close(finish(vision, states[-1], 2), expected.pooler_output)


def test_grid_is_resized_to_the_decoder_latent(images):
    """As in the 384 px model, whose 27 x 27 positions feed a 24 x 24 decoder."""
    model = tiny_dualtoken(decoder_latent=2, decoder_multipliers=[1, 1, 2, 2], decoder_attention=[])
    assert model.decode(model.encode(images).codes).shape == images.shape


@pytest.mark.parametrize(
    "changes",
    [
        {"pixel": {"shared_codebook": False}, "semantic": {"shared_codebook": False}},
        {"pixel": {"depth": 2, "code_dim": 16, "codebook_size": 24}},
    ],
    ids=["a codebook for each depth", "streams of unequal sizes"],
)
def test_codebooks_of_other_arrangements(images, tmp_path, changes):
    model = tiny_dualtoken(streams=changes).train()
    model(images)
    model.eval().save_pretrained(tmp_path)
    loaded = DualToken.from_pretrained(tmp_path)
    encoded = loaded.encode(images)
    assert encoded.codes["pixel"].shape[-1] == changes["pixel"].get("depth", 3)
    for stream, codes in encoded.codes.items():
        book = loaded.codebook(stream)
        assert torch.equal(book, model.codebook(stream))
        books = book if book.ndim == 3 else [book] * codes.shape[-1]
        by_hand = sum(book[codes[..., depth]] for depth, book in enumerate(books))
        torch.testing.assert_close(loaded.embed(codes, stream), by_hand)
    fast = FastDualToken(loaded, torch.float32)
    assert torch.equal(fast.encode(images).codes["pixel"], encoded.codes["pixel"])
    torch.testing.assert_close(fast.decode(encoded.codes), loaded.decode(encoded.codes), rtol=1e-4, atol=1e-5)
    assert model.fingerprint() != tiny_dualtoken().fingerprint()
    if "semantic" in changes:
        with pytest.raises(ValueError, match="streams semantic, pixel have a codebook for each depth"):
            read_codebooks(tmp_path)
    else:
        assert read_codebooks(tmp_path).streams[1] == Stream("pixel", 2, 24, 16)


def test_preprocess_resizes_the_short_side_and_crops_the_centre():
    model = tiny_dualtoken()
    image = Image.new("RGB", (60, 20), "black")
    image.paste("white", (20, 0, 40, 20))
    x = model.preprocess(image)
    assert x.shape == (3, 16, 16)
    assert x[:, :, 4:12].min() > 0.99 and x.max() <= 1


def test_wrong_inputs_are_named(images, tmp_path):
    model = tiny_dualtoken()
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*\(B, 3, 16, 16\)"):
        model.encode(images[..., :8, :8])
    with pytest.raises(ValueError, match="pixel codes of shape"):
        model.decode({"pixel": torch.zeros(1, 4, 4, 2, dtype=torch.int64)})
    with pytest.raises(ValueError, match="decoded from pixel codes; pixel are missing"):
        model.decode({"semantic": torch.zeros(1, 4, 4, 3, dtype=torch.int64)})
    for changes, words in (
        ({"semantic": {"layers": [4]}}, r"'semantic' reads the layers \[4\]; each must be 1 to 3"),
        (
            {"pixel": {"layers": [3], "weights": []}},
            "'pixel' reads layer 3, but the layers behind layer 2 get quantised",
        ),
        ({"pixel": {"weights": [1.0]}}, "'pixel' has 1 weights for 2 layers"),
        ({"pixel": {"feeds": ["sound"]}}, "'pixel' feeds .*; give one or both of teacher, picture"),
        ({"pixel": {"timing": "daily"}}, "'pixel' timing is 'daily'"),
        ({"two words": {"layers": [1], "feeds": ["picture"]}}, "'two words'"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny_dualtoken(streams=changes)
    with pytest.raises(ValueError, match="holds no config.json"):
        DualToken.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ValueError, match="not a DualToken"):
        DualTokenConfig.load(tmp_path)


def unusual_file(name: str) -> bytes:
    """A file of 32 x 16 px whose left half is white, and whose right one is dark, once they are upright."""
    seen = np.full((16, 32, 4), 255, dtype=np.uint8)
    seen[:, 16:] = (0, 0, 0, 255)
    clear = seen.copy()
    clear[:, :16] = 0  # transparent
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = np.where(seen[..., 0], 65535, 200).astype(np.uint16)
    image, options = {
        "alpha": (Image.fromarray(clear), {}),
        "turned": (Image.fromarray(seen).convert("RGB").transpose(Image.Transpose.ROTATE_90), {"exif": turned}),
        "both": (Image.fromarray(clear).transpose(Image.Transpose.ROTATE_90), {"exif": turned}),
        "16 bits": (Image.fromarray(grey), {}),
    }[name]
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["alpha", "turned", "both", "16 bits"])
def test_a_file_is_the_same_image_everywhere(name, tmp_path):
    """In the pipeline, in training, in evaluation of tars and folders, and to an exported model."""
    data = unusual_file(name)
    expected = torch.ones(3, 16, 16)
    expected[:, :, 8:] = -1
    model, open_image = tiny_dualtoken(), lambda: Image.open(io.BytesIO(data))
    path, tar = tmp_path / "folder/x.png", tmp_path / "x.tar"
    path.parent.mkdir()
    path.write_bytes(data)
    with tarfile.open(tar, "w") as file:
        file.add(path, "x.png")
    pair = RawDocument("k", [RawTurn(Role.CAPTION, [RawImage(data), "x"])])
    (piped,) = decode(pair, FilterConfig(), EncodeConfig()).images
    processor, text = MegaDualProcessor(train_text_tokenizer(["a"], 300), 16, 16), base64.b64encode(data).decode()
    processor.allow_paths = True
    given = [open_image(), str(path), text, f"data:image/png;base64,{text}"]
    images = {
        "pipeline": to_tensor(centre_crop(piped.image, 16)),
        "DualToken": model.preprocess(open_image()),
        "FastDualToken": FastDualToken(model).preprocess(open_image()),
        "training": read_pairs(str(tar), 16)[0][0],
        "tars": next(iter(SampleReader(str(tar), 16)))[0],
        "folder": next(iter(SampleReader(str(path.parent), 16)))[0],
        **dict(
            zip(
                ("PIL", "path", "base64", "data:"),
                processor(images=given)["pixel_values"],
                strict=True,
            )
        ),
    }
    for where, image in images.items():
        assert (image - expected)[:, :, [0, 1, 2, -3, -2, -1]].abs().max() < 0.01, where  # bicubic at the edge between
    crop = random_crop(open_image(), 16, 1.0, random.Random(0))
    assert crop.getpixel((0, 0)) == (255, 255, 255) and crop.getpixel((15, 15)) == (0, 0, 0)


def test_what_is_no_image_is_told(tmp_path):
    processor = MegaDualProcessor(train_text_tokenizer(["a"], 300), 16, 16)
    with pytest.raises(ValueError, match="'no/such.png' is no image: no file, and no base64"):
        processor(images="no/such.png", allow_paths=True)
    with pytest.raises(TypeError, match="not int"):
        processor(images=5)


def test_opening_a_siglip_or_a_dualtoken_warns_of_nothing(tmp_path, monkeypatch):
    """Also of one whose config says as little of its text's special tokens as the published ones do."""
    path, warned = write_tiny_siglip(tmp_path / "siglip") / "config.json", []
    stored = json.loads(path.read_text())
    stored["text_config"] = {name: v for name, v in stored["text_config"].items() if not name.endswith("_token_id")}
    path.write_text(json.dumps(stored))
    monkeypatch.setattr(configuration_utils.logger, "warning_once", lambda message, *_: warned.append(message))
    siglip = load_siglip(tmp_path / "siglip")
    DualToken(tiny_dualtoken_config(siglip=siglip.config.to_dict())).save_pretrained(tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "config.json").read_text())
    stored["siglip"]["text_config"] |= {"bos_token_id": 49406, "eos_token_id": 49407}  # as they were stored before
    (tmp_path / "new" / "config.json").write_text(json.dumps(stored))
    opened = DualToken.from_pretrained(tmp_path / "new")
    assert not warned and opened.siglip_model.config.text_config.eos_token_id is None
