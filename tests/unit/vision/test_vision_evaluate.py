"""Evaluating a DualToken: folders and tars, what is measured, what is left out and said so, the page."""

import io
import json
import re
import tarfile

import pytest
import torch
from PIL import Image

from megadual.errors import UserError
from megadual.testing.vision import tiny_dualtoken, write_tiny_pairs
from megadual.text import save_text_tokenizer, train_text_tokenizer
from megadual.vision.data import read_pairs
from megadual.vision.eval.evaluate import Options, evaluate, main
from megadual.vision.eval.samples import batches
from megadual.vision.eval.zero_shot import TEMPLATES, Classes, class_embeddings, class_logits, read_templates
from megadual.vision.metrics import psnr, retrieval_r1
from megadual.vision.siglip import SiglipSize, build, image_embeddings, load_siglip, load_tokenizer, text_embeddings

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a DualToken of 16 px images and of a SigLIP with its text tokenizer, weights random."""
    folder = tmp_path_factory.mktemp("models")
    tiny_dualtoken().save_pretrained(folder / "dualtoken")
    tokenizer = train_text_tokenizer([f"a {colour} disc" for colour in COLOURS], 300)
    torch.manual_seed(0)
    siglip = build(SiglipSize(16, 4, 32, 64, vision_layers=3, text_layers=1, heads=2, text_length=16), tokenizer)
    siglip.save_pretrained(folder / "siglip")
    save_text_tokenizer(tokenizer, folder / "siglip")
    return {"model": str(folder / "dualtoken"), "siglip": str(folder / "siglip")}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_tiny_pairs(tmp_path_factory.mktemp("pairs"), shards=2, pairs=6)


@pytest.fixture
def folder(tmp_path, pairs):
    """Images in folders named by class, one of them broken."""
    images, captions = read_pairs(pairs, 16)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        path = tmp_path / "images" / caption.split()[1] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(path)
    (tmp_path / "images" / "red").mkdir(exist_ok=True)
    (tmp_path / "images" / "red" / "broken.png").write_bytes(b"not an image")
    return tmp_path / "images"


def test_tars_with_captions(models, pairs, tmp_path):
    report = evaluate(Options(**models, data=pairs, train_data=pairs, output=tmp_path, batch_size=5))
    dualtoken, siglip = tiny_dualtoken(), load_siglip(models["siglip"])
    images, captions = read_pairs(pairs, 16)
    encoded = dualtoken.encode(images)
    codes = encoded.codes
    assert report["n"] == report["captions"] == 12
    assert report["psnr"] == pytest.approx(psnr(dualtoken.decode(codes), images).mean().item(), rel=1e-5)
    mean = images.mean(dim=0, keepdim=True).expand_as(images)
    assert report["psnr_mean_image"] == pytest.approx(psnr(mean, images).mean().item(), rel=1e-5)
    assert report["code_usage_pixel"] == pytest.approx(codes["pixel"].unique().numel() / 32)
    assert report["codes_semantic"] == report["codes_pixel"] == codes["pixel"].numel()
    texts = text_embeddings(siglip, load_tokenizer(models["siglip"]), captions)
    assert report["retrieval_r1_quantized"] == retrieval_r1(encoded.pooled, texts, captions)
    teacher = image_embeddings(siglip, images)
    assert report["retrieval_r1_text_to_image_teacher"] == retrieval_r1(texts, teacher, captions)
    assert set(report["left_out"]) == {"rfid", "zero_shot"} and report["frechet_efficientnet_lite0"] > 0
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = re.sub(r"<[^>]*>", "|", (tmp_path / "report.html").read_text())
    for row in (
        rf"reconstruction: PSNR, mean over the images\|+{report['psnr']:.4g} dB\|+higher is better\|+psnr\|",
        rf"\(perplexity\), pixel\|+{report['perplexity_pixel']:.4g}\|+higher is better",
        rf"caption is theirs, through the codes\|+{report['retrieval_r1_quantized']:.2%}".replace("%", " %")
        + r"\|+higher is better; chance: 8\.33 %",
        r"on features of efficientnet_lite0\|+[\d.e-]+\|+lower is better",
    ):
        assert re.search(row, page), row


def test_a_folder_without_captions_or_siglip(models, folder, tmp_path):
    report = evaluate(Options(model=models["model"], data=str(folder), output=tmp_path / "out", pictures=5))
    assert report["n"] == 12 and report["left_out"]["retrieval"] == "no --siglip was given"
    assert len(report["unreadable"]) == 1 and "broken.png" in report["unreadable"][0]
    assert not any(name.startswith(("retrieval", "zero_shot")) for name in report)
    page = (tmp_path / "out/report.html").read_text()
    shown = [float(value) for value in re.findall(r"psnr ([\d.]+) ", page)]
    assert shown == sorted(shown) and len(shown) == 5 and page.count("data:image/webp") == 10
    assert "5 of 12 images" in page and "no --siglip was given" in page
    assert Image.open(tmp_path / "out/reconstructions-0.png").width > 5 * 2 * 16


def test_a_decoder_of_another_size_is_measured_at_the_images_size(folder, tmp_path):
    tiny_dualtoken(decoder_multipliers=[1, 2]).save_pretrained(tmp_path / "small")
    report = evaluate(Options(model=str(tmp_path / "small"), data=str(folder), output=tmp_path / "out"))
    assert report["n"] == 12 and "decoded at 8 px" in report["definitions"]["reconstructions"]


def test_captions_missing_is_said(models, folder, tmp_path):
    report = evaluate(Options(**models, data=str(folder), output=tmp_path / "out"))
    assert "has a caption" in report["left_out"]["retrieval"] and "chance" not in report


def test_zero_shot_counts_images_nearest_to_their_own_class(models, folder, tmp_path):
    (tmp_path / "classes.txt").write_text("".join(f"{colour}\ta {colour} disc\n" for colour in COLOURS))
    (tmp_path / "templates.txt").write_text("a picture of {}\n\nit is {}.\n")
    options = {"classes": tmp_path / "classes.txt", "templates": tmp_path / "templates.txt"}
    report = evaluate(Options(**models, data=str(folder), output=tmp_path / "out", **options))
    assert "zero_shot" not in report["left_out"] and report["zero_shot_top5_quantized"] == 1  # of four classes

    siglip, tokenizer = load_siglip(models["siglip"]), load_tokenizer(models["siglip"])
    prompts = [[t.format(f"a {colour} disc") for t in ("a picture of {}", "it is {}.")] for colour in COLOURS]
    unit = torch.nn.functional.normalize
    wanted = unit(torch.stack([unit(text_embeddings(siglip, tokenizer, two), dim=1).mean(0) for two in prompts]), dim=1)
    hits = []
    for samples, _ in batches(str(folder), 16, 4):
        best = (unit(image_embeddings(siglip, samples.images), dim=1) @ wanted.T).argmax(dim=1)
        hits += [COLOURS[i] == label for i, label in zip(best.tolist(), samples.labels, strict=True)]
    assert report["zero_shot_top1_teacher"] == pytest.approx(sum(hits) / len(hits))

    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    with pytest.raises(UserError, match="does not list"):
        evaluate(Options(**models, data=str(folder), output=tmp_path / "out", **options))


def test_classes_are_found_by_key_name_or_number_and_templates_are_checked(models, tmp_path):
    (tmp_path / "classes.txt").write_text("n01\ttench\nn02\tgreat white shark\n")
    classes = Classes(tmp_path / "classes.txt")
    assert [classes.number(label, "x") for label in ("n02", "tench", "1")] == [1, 0, 1]
    (tmp_path / "templates.txt").write_text("a photo\n")
    with pytest.raises(UserError, match="a photo"):
        read_templates(tmp_path / "templates.txt")
    siglip, tokenizer = load_siglip(models["siglip"]), load_tokenizer(models["siglip"])
    embeddings = class_embeddings(siglip, tokenizer, classes.names, list(TEMPLATES))
    logits = class_logits(3 * embeddings, embeddings)
    torch.testing.assert_close(logits.diagonal(), torch.full((2,), 100.0))


def test_an_image_may_have_several_captions(models, tmp_path):
    """Five captions of four images; the tables of hits are those of similarities computed one by one."""
    generator, written = torch.Generator().manual_seed(0), {"a": "red\nblue\n", "b": "green", "c": "yellow", "d": "red"}
    images = tmp_path / "images"
    images.mkdir()
    for name, captions in written.items():
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(captions)
    report = evaluate(Options(**models, data=str(images), output=tmp_path / "out", batch_size=3))
    siglip, tokenizer = load_siglip(models["siglip"]), load_tokenizer(models["siglip"])
    texts = ["red", "blue", "green", "yellow", "red"]
    ((samples, _),) = batches(str(images), 16, 8)
    cosines = torch.nn.functional.cosine_similarity(
        image_embeddings(siglip, samples.images)[:, None], text_embeddings(siglip, tokenizer, texts)[None], dim=-1
    )
    own = [set(captions.split()) for captions in written.values()]
    found = [texts[i] in own[n] for n, i in enumerate(cosines.argmax(dim=1).tolist())]
    assert report["retrieval_r1_teacher"] == sum(found) / 4 and report["captions"] == 5
    found = [text in own[n] for text, n in zip(texts, cosines.argmax(dim=0).tolist(), strict=True)]
    assert report["retrieval_r1_text_to_image_teacher"] == sum(found) / 5


def test_labels_of_tars_and_captions_of_folders(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (20, 16), "red").save(image, "PNG")
    members = {"a.png": image.getvalue(), "a.cls": b"3\n", "b.png": image.getvalue(), "b.json": b'{"label": "fox"}'}
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (samples, bad), *rest = batches(str(tmp_path / "some.tar"), 16, 4)
    assert samples.labels == ["3", "fox"] and samples.images.shape == (2, 3, 16, 16) and not bad and not rest
    (tmp_path / "x.png").write_bytes(image.getvalue())
    (tmp_path / "x.txt").write_text("a red field\n")
    ((samples, _),) = batches(str(tmp_path), 16, 4)
    assert samples.captions == ["a red field"] and samples.labels == [""]


def write_tar(path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_labels_and_captions_that_cannot_be_read_are_listed(models, tmp_path, capsys):
    """They cost no more than their part in zero-shot classification."""
    image = io.BytesIO()
    Image.new("RGB", (20, 16), "red").save(image, "PNG")
    labels = {
        "a.cls": b"red", "b.cls": b"\xff", "c.json": b'{"label": ', "d.json": b"[1, 2]", "e.json": b'{"label": "red"}',
        "f.json": b"[" * 100_000,
    }  # fmt: skip
    members = {}
    for name, label in labels.items():
        members |= {f"{name[0]}.png": image.getvalue(), name: label}
    data = write_tar(tmp_path / "some.tar", members)
    (tmp_path / "classes.txt").write_text("green\nred\n")
    arguments = ["--model", models["model"], "--siglip", models["siglip"], "--classes", str(tmp_path / "classes.txt")]
    main([*arguments, "--data", data, "--output", str(tmp_path / "out"), "--device", "cpu"])
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["n"] == 6 and report["zero_shot_images"] == 2 and report["zero_shot_top5_teacher"] == 1
    assert report["unreadable"] == [f"{name}: its label can't be read" for name in "bcdf"]
    assert "unreadable: 4, listed in report.json; the first: b: its label" in capsys.readouterr().out

    data = write_tar(tmp_path / "none.tar", {k: v for k, v in members.items() if k[0] in "bcd"})
    report = evaluate(Options(**models, data=data, output=tmp_path, classes=tmp_path / "classes.txt"))
    assert report["left_out"]["zero_shot"] == "no image has a label that can be read"
    assert "zero_shot_images" not in report

    (tmp_path / "images").mkdir()
    for name in "xy":
        (tmp_path / f"images/{name}.png").write_bytes(image.getvalue())
        (tmp_path / f"images/{name}.txt").write_bytes(b"caf\xe9\n")
    ((samples, _),) = batches(str(tmp_path / "images"), 16, 4)
    assert samples.captions == ["caf\ufffd"] * 2


@pytest.mark.parametrize("pixel", [{"depth": 4}, {"codebook_size": 64}, {"codebook_size": 16}])
def test_use_of_codes_where_the_streams_differ(pixel, pairs, tmp_path):
    model = tiny_dualtoken(streams={"pixel": pixel})
    model.save_pretrained(tmp_path / "model")
    report = evaluate(Options(model=str(tmp_path / "model"), data=pairs, output=tmp_path))
    for stream, found in model.encode(read_pairs(pairs, 16)[0]).codes.items():
        assert report[f"codes_{stream}"] == found.numel()
        size = model.config.streams[stream].codebook_size
        assert report[f"code_usage_{stream}"] == pytest.approx(found.unique().numel() / size)


def test_use_of_codes_where_each_depth_has_its_own(pairs, tmp_path):
    """Code 1 of a depth and code 1 of another are two codes."""
    model = tiny_dualtoken(streams={"pixel": {"shared_codebook": False}})
    model.save_pretrained(tmp_path / "model")
    report = evaluate(Options(model=str(tmp_path / "model"), data=pairs, output=tmp_path))
    codes = model.encode(read_pairs(pairs, 16)[0]).codes["pixel"].flatten(0, 2).T
    assert report["code_usage_pixel"] == pytest.approx(sum(depth.unique().numel() for depth in codes) / (3 * 32))
    shares = [torch.bincount(depth) / depth.numel() for depth in codes]
    entropies = [-(share[share > 0] * share[share > 0].log()).sum() for share in shares]
    assert report["perplexity_pixel"] == pytest.approx(sum(e.exp().item() for e in entropies) / 3, rel=1e-5)


def test_loading_processes_read_every_sample_once(pairs):
    alone = [name for samples, _ in batches(pairs, 16, 4) for name in samples.names]
    shared = [name for samples, _ in batches(pairs, 16, 4, workers=2) for name in samples.names]
    assert sorted(shared) == sorted(alone) and len(set(alone)) == 12


def test_mistakes_are_told_in_a_line(models, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for data, message in ((tmp_path / "empty", "holds no image"), (tmp_path / "none-*.tar", "no shard matches")):
        with pytest.raises(SystemExit, match="2"):
            main(
                ["--model", models["model"], "--data", str(data), "--output", str(tmp_path / "out"), "--device", "cpu"]
            )
        assert message in capsys.readouterr().err
