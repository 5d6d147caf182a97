"""The exported model by itself: prompts with images, drawing step by step, sampling."""

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints_tools import convert_to_hf
from megadual.hf.decoding import Sampler
from megadual.hf.modeling_megadual import MegaDualForCausalLM
from megadual.hf.processing_megadual import MegaDualProcessor
from megadual.streams import STREAMS
from megadual.testing.models import CODEBOOK, DEPTH, IMAGE_SIZE, write_run
from megadual.text import load_text_tokenizer

N = 16  # positions of an image


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("hf"))
    tokenizer = load_text_tokenizer(run.model.text_tokenizer)
    dualtoken = convert_to_hf.read_dualtoken(run)
    torch.manual_seed(0)
    model = MegaDualForCausalLM(convert_to_hf.model_config(run, tokenizer, dualtoken, torch.float32)).eval()
    with torch.no_grad():  # sharper than at initialisation, so that equal logits mean something
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 20, 28, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(x.numpy()) for x in noise]


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CODEBOOK, (*shape, DEPTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_drawing_step_by_step_equals_one_forward_pass(model, scale):
    """Captions of other lengths beside it (left padding), the caches and guidance change nothing."""
    special = model.config.special
    captions = [[10, 11, 12, 13, 14], [20]]
    forced = torch.stack([random_codes(2, N, seed=seed) for seed in range(len(STREAMS))])
    seen = torch.zeros(len(STREAMS), 2, N, DEPTH, CODEBOOK)

    def choose(position, d, logits):
        seen[:, :, position, d] = logits
        return forced[:, :, position, d]

    drawn = model.draw_codes(captions, scale, choose=choose)
    for b, caption in enumerate(captions):
        whole = []
        for prompt in (caption, []):
            ids = torch.tensor([[*prompt, special.image_gen_start] + [special.image] * N + [special.image_gen_end]])
            codes = {f"{stream}_codes": forced[t, b] for t, stream in enumerate(STREAMS)}
            with torch.no_grad():
                whole.append(model(input_ids=ids, **codes))
        for t, stream in enumerate(STREAMS):
            assert torch.equal(drawn[stream], forced[t])
            conditional, unconditional = (getattr(output, f"{stream}_logits") for output in whole)
            expected = unconditional + scale * (conditional - unconditional)
            assert expected.shape == (N, DEPTH, CODEBOOK) and expected.std() > 0.1
            assert (seen[t, b] - expected).abs().max() < 1e-4


def test_the_same_seed_draws_the_same_image(model):
    first, second = model.draw(["two cats", "a tree on blue"], seed=5)
    again, _ = model.draw(["two cats", "a tree on blue"], seed=5)
    assert first.size == (IMAGE_SIZE, IMAGE_SIZE) and first.tobytes() == again.tobytes()
    # Alone, sums may round differently than in a batch: by a grey level, not by another code.
    for picture, prompt, seed in ((first, "two cats", 5), (second, "a tree on blue", 6)):
        alone = model.draw([prompt], seed=seed)[0]
        assert np.abs(np.asarray(alone, dtype=int) - np.asarray(picture, dtype=int)).max() <= 1
    assert model.draw(["two cats"], seed=6)[0].tobytes() != first.tobytes()
    assert model.draw(["a dog"], seed=5)[0].tobytes() != first.tobytes()


def test_describing_equals_a_loop_without_cache(model, pictures):
    texts = model.describe(pictures, prompt="a", max_new_tokens=6)
    processor = MegaDualProcessor(model.tokenizer, image_size=IMAGE_SIZE, image_positions=N)
    for text, picture in zip(texts, pictures, strict=True):
        inputs = processor(text="<image>a", images=picture)
        ids, start = inputs["input_ids"], inputs["input_ids"].size(1)
        for _ in range(6):
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert text == model.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert len(set(texts)) > 1


def test_generate_with_prompts_of_different_lengths(model, pictures):
    processor = MegaDualProcessor(model.tokenizer, image_size=IMAGE_SIZE, image_positions=N)
    prompts = ["a <image> and <image>: two", "<image>"]
    batch = processor(text=prompts, images=pictures)
    assert batch["attention_mask"][1, 0] == 0 and batch["pixel_values"].shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    together = model.generate(**batch, max_new_tokens=5, min_new_tokens=5)[:, -5:]
    alone = [
        model.generate(**processor(text=prompt, images=images), max_new_tokens=5, min_new_tokens=5)[0, -5:]
        for prompt, images in zip(prompts, (pictures[:2], pictures[2:]), strict=True)
    ]
    assert torch.equal(together, torch.stack(alone))


def test_images_come_as_pixels_or_as_codes(model, pictures):
    processor = MegaDualProcessor(model.tokenizer, image_size=IMAGE_SIZE, image_positions=N)
    inputs = processor(images=pictures[:2])
    encoded = model.dualtoken.encode(inputs["pixel_values"])
    with torch.no_grad():
        by_pixels = model(**inputs).logits
        by_codes = model(
            input_ids=inputs["input_ids"], semantic_codes=encoded.semantic, pixel_codes=encoded.pixel
        ).logits
    assert torch.equal(by_pixels, by_codes)


def test_images_that_do_not_count_are_refused(model, pictures):
    processor = MegaDualProcessor(model.tokenizer, image_size=IMAGE_SIZE, image_positions=N)
    with pytest.raises(ValueError, match="2 <image> marks for 1 images"):
        processor(text="<image><image>", images=pictures[0])
    ids = processor(images=pictures[0])["input_ids"]
    with pytest.raises(ValueError, match="16 <image> positions, codes for 0"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="16 <image> positions, codes for 15"):
        model(input_ids=ids, semantic_codes=random_codes(15), pixel_codes=random_codes(15))


def test_sampling_keeps_to_top_k_and_top_p():
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = probabilities.log().expand(1000, -1)
    uniform = (torch.arange(1000) + 0.5) / 1000

    def shares(temperature=1.0, top_k=5, top_p=1.0):
        sampler = Sampler(top_k, logits.device)
        sampler.temperature.fill_(temperature)
        sampler.top_p.fill_(top_p)
        return torch.bincount(sampler(logits, uniform), minlength=5) / 1000

    assert torch.allclose(shares(), probabilities, atol=2e-3)
    assert torch.allclose(shares(top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7, 0]), atol=2e-3)
    assert torch.allclose(shares(top_p=0.75), torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85, atol=2e-3)
    assert torch.allclose(shares(top_p=0.3), torch.tensor([0.0, 1, 0, 0, 0]))
    assert shares(temperature=0.1)[1] > 0.9
