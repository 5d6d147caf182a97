"""The ablation's script on a corpus of a few images: its variants, its table, and going on where it stopped."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    import ablation
    import ablation_runs

    yield ablation, ablation_runs
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def prepared(modules, tmp_path_factory):
    """(output folder, settings) with the corpus and a SigLIP of a few steps."""
    _, runs = modules
    sizes = {"train_images": 40, "heldout_images": 12, "siglip_steps": 3, "siglip_batch": 8, "steps": 3, "batch": 4}
    settings = dataclasses.replace(runs.TINY, **sizes, width=32, codebook_size=16)
    output = tmp_path_factory.mktemp("ablation")
    runs.prepare(output, settings, torch.device("cpu"))
    (output / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
    return output, settings


def build(runs, prepared, name: str):
    output, settings = prepared
    torch.manual_seed(0)
    siglip = runs.load_siglip(output / "siglip")
    return runs.build_tokenizer(runs.VARIANTS[name], settings, siglip), settings


def test_one_codebook_serves_both_goals_and_dual_has_two(modules, prepared):
    _, runs = modules
    images = runs.load_parts(prepared[0], torch.device("cpu"))["heldout"][:2]
    one, settings = build(runs, prepared, "one_deep_2x")
    codes = one.eval().encode(images)
    assert codes.codes["both"].shape[-1] == 2 * settings.depth and codes.pooled is not None
    torch.testing.assert_close(one.decode(codes.codes), one(images).reconstruction.clamp(-1, 1))
    dual, _ = build(runs, prepared, "dual")
    codes = dual.eval().encode(images).codes
    assert not torch.equal(codes["semantic"], codes["pixel"])
    assert [stream.layers for stream in dual.config.streams.values()] == [[settings.deep], [settings.shallow]]


def test_codebooks_move_once_a_step_between_steps(modules, prepared):
    _, runs = modules
    for name in ("one_deep", "dual"):
        model, settings = build(runs, prepared, name)
        images = runs.load_parts(prepared[0], torch.device("cpu"))["heldout"][:2]
        books = [quantizer.codebook for quantizer in model.quantizers.values()]
        for book in books:
            book.restart_unused_codes = False
        updates = runs.CodebookUpdates(model.train())
        before = books[0].weight.clone()
        model(images)
        assert torch.equal(books[0].weight, before)
        updates()
        positions = images.shape[0] * (settings.image_size // settings.patch_size) ** 2 * settings.depth
        expected = 0.99 * settings.codebook_size + 0.01 * positions
        for book in books:
            assert book.cluster_size_ema.sum().item() == pytest.approx(expected, rel=1e-4)


def test_a_step_asks_the_host_for_nothing(modules, prepared):
    """Else it could not be captured as a CUDA graph: no number is read back, no shape depends on data."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    _, runs = modules
    images = runs.load_parts(prepared[0], torch.device("cpu"))["heldout"][:2]
    for name in ("one_deep", "dual"):
        model, _ = build(runs, prepared, name)
        runs.CodebookUpdates(model.train())
        with NoReading():
            output = model(images)
            runs.distillation(output, images, output.features.detach(), output.pooled.detach())["pooled_cos"].backward()


def test_crops_keep_the_image_but_for_its_rim(modules):
    import ablation_training as training

    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(2, 3, 32, 32).contiguous()
    crops = training.random_crops(ramp, torch.Generator().manual_seed(0))
    assert crops.shape == ramp.shape and not torch.equal(crops[0], crops[1])
    assert (crops - (ramp / 127.5 - 1)).abs().max() < 0.2
    slope = (crops[..., 20] - crops[..., 10]).mean() / (80 / 127.5)
    assert 0.9**0.5 <= slope <= 1


def test_runs_are_repeatable_kept_when_finished_and_summed_up(modules, prepared):
    script, runs = modules
    output, settings = prepared
    for name in ("one_deep", "dual"):
        runs.run(name, 0, output, settings, torch.device("cpu"))
    path = output / "runs/dual-0.json"
    first = json.loads(path.read_text())
    runs.run("dual", 0, output, settings, torch.device("cpu"))
    again = json.loads(path.read_text())
    assert {**first, "seconds_per_step": 0} == {**again, "seconds_per_step": 0}
    assert script.finished(path, dataclasses.asdict(settings))
    assert not script.finished(path, dataclasses.asdict(dataclasses.replace(settings, steps=4)))

    before = path.read_bytes()
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(settings).items()]
    script.main(
        ["--output", str(output), "--seeds", "1", "--variants", "one_deep", "dual", "--device", "cpu", *arguments]
    )
    assert path.read_bytes() == before  # nothing was left to do
    table = (output / "table.md").read_text()
    assert f"{first['psnr']:.2f} ± 0.00" in table and "28.69" in table and table.count("\n| ") == 4
