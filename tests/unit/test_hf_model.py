"""The exported model by itself: prompts with images, drawing step by step, sampling."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from megadual.data.layout import Reading, to_sequence
from megadual.hf import decoding, export
from megadual.hf.decoding import Sampler, StaticLLM
from megadual.hf.drawn_codes import INFO, kept_codes
from megadual.hf.modeling_megadual import MegaDualForCausalLM
from megadual.streams import SPECIAL_TOKENS, Document, ImageUse, Marks, Role, TurnBit
from megadual.testing.models import CODEBOOK, DEPTH, IMAGE_SIZE, write_run
from megadual.text import load_text_tokenizer

N = 16  # positions of an image
POSITIONS = 256  # of the model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = write_run(
        tmp_path_factory.mktemp("hf"), f"train.seq_len={POSITIONS}", f"train.global_batch_tokens={POSITIONS}"
    )
    tokenizer = load_text_tokenizer(run.model.text_tokenizer)
    dualtoken = export.read_dualtoken(run)
    torch.manual_seed(0)
    model = MegaDualForCausalLM(export.model_config(run, tokenizer, dualtoken, torch.float32)).eval()
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
    forced = {stream: random_codes(2, N, seed=seed) for seed, stream in enumerate(model.streams)}
    seen = {stream: torch.zeros(2, N, DEPTH, CODEBOOK) for stream in model.streams}

    def choose(position, stream, d, logits):
        seen[stream][:, position, d] = logits
        return forced[stream][:, position, d]

    drawn = model.draw_codes(captions, scale, choose=choose)
    for b, caption in enumerate(captions):
        whole = []
        for prompt in (caption, []):
            ids = torch.tensor([[*prompt, special.image_gen_start] + [special.image] * N + [special.image_gen_end]])
            with torch.no_grad():
                whole.append(model(input_ids=ids, codes={stream: codes[b] for stream, codes in forced.items()}))
        for stream, codes in forced.items():
            assert torch.equal(drawn[stream], codes)
            conditional, unconditional = (output.visual_logits[stream] for output in whole)
            expected = unconditional + scale * (conditional - unconditional)
            assert expected.shape == (N, DEPTH, CODEBOOK) and expected.std() > 0.1
            assert (seen[stream][b] - expected).abs().max() < 1e-4


def test_drawing_with_caches_equals_every_position_without(model):
    """Each position by a forward pass of its own over all before it, nothing kept."""
    special, caption = model.config.special, [10, 11, 12]
    forced = {stream: random_codes(N, seed=seed) for seed, stream in enumerate(model.streams)}
    seen = {stream: torch.zeros(N, DEPTH, CODEBOOK) for stream in model.streams}

    def choose(position, stream, d, logits):
        seen[stream][position, d] = logits[0]
        return forced[stream][position, d, None]

    model.draw_codes([caption], cfg_scale=1.0, choose=choose)
    for position in range(N):
        ids = torch.tensor([[*caption, special.image_gen_start] + [special.image] * (position + 1)])
        codes = {stream: codes[: position + 1] for stream, codes in forced.items()}
        with torch.no_grad():
            output = model(input_ids=ids, codes=codes, use_cache=False)
        for stream, logits in output.visual_logits.items():
            assert (seen[stream][position] - logits[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("piece", [512, 7])
def test_text_step_by_step_equals_one_forward_pass(model, pictures, monkeypatch, piece):
    """Two texts with images in them, of different lengths; the longer one starts in the prompt that is read at once, or
    in pieces, the first of which are padding of the other."""
    monkeypatch.setattr(decoding, "PIECE", piece)
    texts = ["a <image> of two cats", "<image> a small tree above three large cars"]
    inputs = model.processor(text=texts, images=pictures[:2])
    embeds = model.embed(inputs["input_ids"], model.codes_of(inputs["pixel_values"]))
    kept = inputs["attention_mask"].bool()
    llm, prompt = StaticLLM(model.model, 2, embeds.size(1)), embeds.size(1) // 2
    with torch.no_grad():
        whole = model(**inputs, position_ids=(kept.cumsum(1) - 1).clamp(min=0)).logits
        llm.prefill(embeds[:, :prompt], kept[:, :prompt])
        steps = [model.lm_head(llm.step(embeds[:, i])) for i in range(prompt, embeds.size(1))]
    assert whole.std() > 0.1 and (torch.stack(steps, dim=1) - whole[:, prompt:]).abs().max() < 1e-4


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
    two = model.draw("two cats", n=2, seed=5)
    assert two[0].tobytes() == first.tobytes() and two[1].tobytes() != first.tobytes()


def test_changed_weights_are_drawn_with(model):
    before = model.draw("two cats", seed=5)[0].tobytes()
    weight = model.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        weight.neg_()
        changed = model.draw("two cats", seed=5)[0].tobytes()
        weight.neg_()
    assert changed != before and model.draw("two cats", seed=5)[0].tobytes() == before


def test_describing_equals_a_loop_without_cache(model, pictures):
    texts = model.describe(pictures, prompt="a", max_new_tokens=6, min_new_tokens=6)
    special = vars(model.config.special).values()
    for text, picture in zip(texts, pictures, strict=True):
        inputs = model.processor(text="<image>a", images=picture)
        ids, start = inputs["input_ids"], inputs["input_ids"].size(1)
        for _ in range(6):
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
            logits[:, list(special)] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        assert text == model.tokenizer.decode(ids[0, start:])
    assert len(set(texts)) > 1


def test_describing_by_sampling_repeats_with_its_seed(model, pictures):
    sampled = lambda seed: model.describe(pictures, max_new_tokens=8, temperature=1.0, seed=seed)
    assert sampled(1) == sampled(1) != sampled(2)


def test_generate_with_prompts_of_different_lengths(model, pictures):
    prompts = ["a <image> and <image>: two", "<image>"]
    batch = model.processor(text=prompts, images=pictures)
    assert batch["attention_mask"][1, 0] == 0 and batch["pixel_values"].shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    together = model.generate(**batch, max_new_tokens=5, min_new_tokens=5)[:, -5:]
    alone = [
        model.generate(**model.processor(text=prompt, images=images), max_new_tokens=5, min_new_tokens=5)[0, -5:]
        for prompt, images in zip(prompts, (pictures[:2], pictures[2:]), strict=True)
    ]
    assert torch.equal(together, torch.stack(alone))


def messages(*images) -> list[dict]:
    shown = [{"type": "image", "image": image} for image in images]
    return [
        {"role": "user", "content": [*shown, {"type": "text", "text": "two cats"}]},
        {"role": "assistant", "content": "a tree"},
        {"role": "user", "content": [{"type": "text", "text": "and"}]},
    ]


def test_images_of_messages_may_come_beside_them(model, pictures):
    inside = model.processor.prompt(messages(*pictures[:2]))
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "two cats"}]}]
    beside = model.processor.prompt(bare + messages()[1:], pictures[:2])
    assert all(torch.equal(inside[name], beside[name]) for name in ("input_ids", "pixel_values"))
    with pytest.raises(ValueError, match="no place for 1 of the images"):
        model.processor.prompt(bare, pictures)
    with pytest.raises(ValueError, match="2 <image> marks for 1 images"):
        model.processor.prompt(bare, pictures[:1])


def test_generate_goes_on_from_messages(model, pictures):
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = model.processor.apply_chat_template(messages(*pictures[:2]), **options)
    prompt = (
        "<|im_start|>user\n<image><image>two cats<|im_end|>\n<|im_start|>assistant\na tree<|im_end|>\n"
        "<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n"
    )
    written = model.processor(text=prompt, images=pictures[:2])
    assert torch.equal(inputs["input_ids"], written["input_ids"])
    assert torch.equal(inputs["pixel_values"], written["pixel_values"])
    sampled = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (2, inputs["input_ids"].size(1) + 3)


@pytest.fixture
def prescribe(monkeypatch):
    """prescribe(tokens) makes texts be those tokens, and gives the list that the logits of every step come to."""
    sample = Sampler.__call__

    def prescribe(tokens: list[int]) -> list[torch.Tensor]:
        script, seen = iter(tokens), []

        def choose(self, logits, uniform):
            if logits.dim() == 3:  # codes
                return sample(self, logits, uniform)
            seen.append(logits[0])
            return torch.tensor([next(script)])

        monkeypatch.setattr(Sampler, "__call__", choose)
        return seen

    return prescribe


def test_an_answer_of_text_and_an_image(model, pictures, prescribe):
    """The logits that its text is chosen from are those of one forward pass over all of it, drawn codes included."""
    special, words, after = model.config.special, [10, 11], [12, 13]
    seen = prescribe([*words, special.image_gen_start, special.image_gen_end, *after, special.end_of_text])
    prompt = [{"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "two"}]}]
    before, drawing, behind = model.interleave(prompt, seed=7)
    assert [before, behind] == [model.tokenizer.decode(part) for part in (words, after)]
    assert drawing.size == (IMAGE_SIZE, IMAGE_SIZE)

    inputs = model.processor.prompt(prompt)
    shown, drawn = model.dualtoken.encode(inputs["pixel_values"]).codes, model._kept[1].codes_NBD
    codes = {stream: torch.cat([shown[stream].flatten(0, -2), drawn[stream][:, 0]]) for stream in drawn}
    image = [special.image_gen_start] + [special.image] * N + [special.image_gen_end]
    ids = torch.tensor([[*inputs["input_ids"][0].tolist(), *words, *image, *after]])
    with torch.no_grad():
        whole = model(input_ids=ids, codes=codes).logits[0]
    start = inputs["input_ids"].size(1) - 1
    image_end = start + len(words) + len(image)
    places = [start, start + 1, start + 2, image_end - 1, image_end, image_end + 1, image_end + 2]
    for logits, place in zip(seen, places, strict=True):
        finite = logits.isfinite()
        assert finite[special.image_gen_start] and not finite[special.image_start]
        assert (logits - whole[place])[finite].abs().max() < 1e-4


def test_an_image_in_an_answer_is_drawn_as_draw_draws_it(model, prescribe):
    special, words = model.config.special, [10, 11]
    prescribe([*words, special.image_gen_start, 0, special.image_gen_start, 0, special.im_end])
    _, first, second = model.interleave("two", seed=7)
    (alone,) = model._images(model.draw_codes([[*model._ids("two"), *words]], seed=7))
    assert first.tobytes() == alone.tobytes() != second.tobytes()


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return made


def test_a_prompt_is_read_in_memory_that_grows_with_its_length(model, monkeypatch):
    """And not with its square: no mask and no scores of all of it against all of it."""
    monkeypatch.setattr(decoding, "PIECE", 8)
    largest = []
    for length in (200, 400):
        llm = StaticLLM(model.model, 1, length)
        embeds, kept = torch.zeros(1, length, 64), torch.ones(1, length, dtype=torch.bool)
        with Largest() as seen, torch.no_grad():
            llm.prefill(embeds, kept)
        largest.append(seen.size)
    assert largest[1] <= 2.2 * largest[0]


@pytest.mark.parametrize("method", ["draw", "edit", "describe", "ask", "interleave", "interleave of messages"])
def test_a_prompt_longer_than_the_model_is_refused_by_both_numbers(model, pictures, method, monkeypatch):
    monkeypatch.setattr(model.model.embed_tokens, "forward", None)  # nothing is computed
    text, image = "x" * 300, pictures[0]
    calls = {
        "draw": lambda: model.draw(text),
        "edit": lambda: model.edit(image, text),
        "describe": lambda: model.describe([image], text),
        "ask": lambda: model.ask([image], text),
        "interleave": lambda: model.interleave(text),
        "interleave of messages": lambda: model.interleave([{"role": "user", "content": text}]),
    }
    with pytest.raises(ValueError, match=rf"takes 3\d\d positions.*the model has {POSITIONS}$"):
        calls[method]()


def test_an_image_that_does_not_fit_behind_its_prompt_is_refused(model):
    text = "x" * (POSITIONS - N - 1)
    assert len(model._ids(text)) == len(text)
    assert model.draw(text, cfg_scale=1.0)
    with pytest.raises(ValueError, match=f"takes {POSITIONS - N + 1} positions and an image 16; the model has 256"):
        model.draw(text + "x")


def test_an_answer_ends_at_the_last_position(model, pictures, prescribe):
    """No image begins that would not fit, and no text goes on behind the last position."""
    special, prompt = model.config.special, "x" * 200
    left = POSITIONS - len(model._ids(prompt))
    seen = prescribe([10] * (left - N - 2) + [special.image_gen_start, 0] + [10] * left)
    answer = model.interleave(prompt, max_new_tokens=1000)
    assert [type(part).__name__ for part in answer] == ["str", "Image"]
    seen = prescribe([10] * 2 * left)
    (answer,) = model.interleave(prompt, max_new_tokens=1000)
    assert model._ids(answer) == [10] * left
    fits = [bool(logits[special.image_gen_start].isfinite()) for logits in seen]
    assert fits == [True] * (left - N - 1) + [False] * (N + 1)
    prescribe([10] * 2 * POSITIONS)
    (described,) = model.describe(pictures[:1], prompt, max_new_tokens=1000)
    assert len(model._ids(described)) == POSITIONS - len(model._ids(prompt)) - N - 2


def test_an_answer_has_no_more_images_than_asked_for(model, prescribe):
    special = model.config.special
    seen = prescribe([special.image_gen_start, 0, 10, special.end_of_text])
    assert len(model.interleave("two", max_images=1)) == 2
    assert seen[0][special.image_gen_start].isfinite() and not seen[2][special.image_gen_start].isfinite()


def test_images_come_as_pixels_or_as_codes(model, pictures):
    processor = model.processor
    inputs = processor(images=pictures[:2])
    encoded = model.dualtoken.encode(inputs["pixel_values"])
    with torch.no_grad():
        by_pixels = model(**inputs).logits
        by_codes = model(input_ids=inputs["input_ids"], codes=encoded.codes).logits
    assert torch.equal(by_pixels, by_codes)


def test_images_that_do_not_count_are_refused(model, pictures):
    processor = model.processor
    with pytest.raises(ValueError, match="2 <image> marks for 1 images"):
        processor(text="<image><image>", images=pictures[0])
    ids = processor(images=pictures[0])["input_ids"]
    with pytest.raises(ValueError, match="16 <image> positions, semantic codes for 0"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="16 <image> positions, pixel codes for 15"):
        model(input_ids=ids, codes={"semantic": random_codes(16), "pixel": random_codes(15)})


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


def edit_document(model, pictures, instruction: str, target: dict[str, torch.Tensor]) -> tuple[Document, Marks]:
    """An edit of pictures as the pipeline stores it: all that the user gives may be dropped."""
    marks = Marks.of(model.tokenizer)
    sources = model.dualtoken.encode(model.processor(images=pictures)["pixel_values"]).codes
    asked, count = model._ids(instruction), len(pictures)
    turns = [
        (count + len(asked), Role.USER, TurnBit.DROPPABLE),
        (count + len(asked) + 1, Role.ASSISTANT, TurnBit.LOSS),
    ]
    uses = [ImageUse.LOOKED_AT | ImageUse.DROPPABLE] * count + [ImageUse.DRAWN]
    document = Document(
        key="edit",
        text_ids=np.array([*[marks.image] * count, *asked, marks.image], dtype=np.uint32),
        codes={
            stream: torch.cat([sources[stream].flatten(0, -2), codes]).numpy().astype(np.uint16)
            for stream, codes in target.items()
        },
        grids=np.full((count + 1, 2), 4, dtype=np.uint16),
        turns=np.array(turns, dtype=np.uint32),
        image_use=np.array(uses, dtype=np.uint8),
    )
    return document.check(marks), marks


@pytest.mark.parametrize(
    ("cfg_scale", "image_scale", "branches"),
    [(3.0, 1.5, 3), (1.0, 2.0, 3), (3.0, 1.0, 2), (2.0, 2.0, 2), (1.0, 1.0, 1)],
)
def test_an_edit_is_guided_by_text_and_image_as_training_drops_them(model, pictures, cfg_scale, image_scale, branches):
    """Every depth's logits are u + s_I (i - u) + s_T (c - i), of forward passes over what training lays out."""
    edits = [(pictures[0], "two"), (pictures[1:], "a small tree")]  # of other lengths, and one of two sources
    forced = {stream: random_codes(2, N, seed=seed) for seed, stream in enumerate(model.streams)}
    seen = {stream: torch.zeros(2, N, DEPTH, CODEBOOK) for stream in model.streams}

    def choose(position, stream, d, logits):
        seen[stream][:, position, d] = logits
        return forced[stream][:, position, d]

    drawn = model.edit_codes(edits, cfg_scale, image_scale, choose=choose)
    assert model._kept[1].branches == branches
    for b, (sources, instruction) in enumerate(edits):
        sources = sources if isinstance(sources, list) else [sources]
        target = {stream: codes[b] for stream, codes in forced.items()}
        document, marks = edit_document(model, sources, instruction, target)
        logits = []
        for dropped in ((False, False), (True, False), (True, True)):
            sequence = to_sequence(document, marks, Reading((False,) * len(document.grids), *dropped))
            tokens = torch.from_numpy(sequence.tokens)
            codes = {
                stream: torch.from_numpy(codes.astype(np.int64))[tokens == marks.image]
                for stream, codes in sequence.codes.items()
            }
            with torch.no_grad():
                logits.append(model(input_ids=tokens[None], codes=codes).visual_logits)
        for stream in model.streams:
            both, image, none = (each[stream] for each in logits)
            expected = none + image_scale * (image - none) + cfg_scale * (both - image)
            assert torch.equal(drawn[stream], forced[stream]) and (both - image).abs().max() > 0.1
            assert (seen[stream][b] - expected).abs().max() < 3e-4


def test_edits_repeat_with_their_seed_beside_any_others(model, pictures):
    three = model.edit(pictures[:2], ["two cats", "a tree"], n=2, seed=5)
    assert len(three) == 4 and three[0].size == (IMAGE_SIZE, IMAGE_SIZE)
    (alone,) = model.edit(pictures[1], "a tree", seed=7)
    assert np.abs(np.asarray(alone, dtype=int) - np.asarray(three[2], dtype=int)).max() <= 1
    assert len({image.tobytes() for image in three}) == 4
    assert model.edit(pictures[0], "a tree", seed=7)[0].tobytes() != alone.tobytes()


@pytest.mark.parametrize("image_scale", [None, 1.5])
def test_an_image_in_a_conversation_is_guided_as_an_edit_is(model, pictures, prescribe, image_scale):
    special = model.config.special
    prescribe([special.image_gen_start, 0, special.im_end])
    (drawn,) = model.interleave([{"role": "user", "content": [pictures[0], "two"]}], image_scale=image_scale, seed=7)
    (edited,) = model.edit(pictures[0], "two", image_scale=image_scale, seed=7)
    assert drawn.tobytes() == edited.tobytes()


def test_guidance_leaves_out_the_last_user_turn_alone(model, pictures):
    conversation = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [pictures[0], "two"]},
        {"role": "assistant", "content": ["cats", pictures[1]]},
        {"role": "user", "content": ["small ", pictures[2], " tree"]},
    ]
    ids = model.processor.prompt(conversation)["input_ids"]

    def left(text: bool, images: bool) -> list[int]:
        return ids[~model._dropped(ids, text, images)].tolist()

    def expected(*content) -> list[int]:
        return model.processor.prompt([*conversation[:3], {"role": "user", "content": list(content)}])["input_ids"][
            0
        ].tolist()

    assert left(True, False) == expected(pictures[2]) and left(True, True) == expected()
    said = model._ids("small ") + model._ids(" tree")
    assert sorted(left(False, True)) == sorted(expected() + said)


def test_a_conversation_goes_on_with_its_answer(model, pictures, prescribe):
    """The next turn reads the drawn image by the codes that it was drawn with: another's pixels do not matter."""
    special, words = model.config.special, [10, 11]
    conversation = [{"role": "user", "content": [pictures[0], "two"]}]
    prescribe([*words, special.image_gen_start, 0, special.im_end])
    answer = model.interleave(conversation, seed=7)
    drawn = {stream: codes[:, 0].clone() for stream, codes in model._kept[1].codes_NBD.items()}
    conversation += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and"}]
    inputs = model.processor.prompt(conversation)
    assert inputs["pixel_values"].size(0) == 1 and inputs["image_codes"].shape == (2, N, 2 * DEPTH)
    codes = model.codes_of(inputs["pixel_values"], inputs["image_codes"])
    encoded = model.dualtoken.encode(model.processor(images=[pictures[0], answer[1].copy()])["pixel_values"]).codes
    for stream in model.streams:
        assert torch.equal(codes[stream][0], encoded[stream][0].flatten(0, 1))
        assert torch.equal(codes[stream][1], drawn[stream])
    special_ids = inputs["input_ids"][0].tolist()
    assert special_ids.count(special.image_gen_start) == 1 and special_ids.count(special.image) == 2 * N
    with torch.no_grad():
        whole = model(input_ids=inputs["input_ids"], codes=codes).logits[0, -1]
        assert torch.allclose(model(**inputs).logits[0, -1], whole)
    seen = prescribe([special.im_end])
    assert model.interleave(conversation) == []
    finite = seen[0].isfinite()
    assert finite[special.im_end] and (seen[0] - whole)[finite].abs().max() < 1e-4


def test_only_what_was_drawn_keeps_its_codes(model):
    (image,) = model.draw("two cats", seed=5)
    streams, fingerprint = list(model.streams), model.dualtoken.fingerprint()
    codes = model.draw_codes([model._ids("two cats")], seed=5)
    whole = torch.cat([codes[stream][0] for stream in streams], dim=-1)
    assert torch.equal(kept_codes(image, fingerprint, streams), whole)
    assert torch.equal(kept_codes(image.copy(), fingerprint, streams), whole)
    assert torch.equal(kept_codes(image, fingerprint, ["pixel"]), codes["pixel"][0])

    changed = image.copy()
    changed.putpixel((3, 4), tuple(255 - value for value in image.getpixel((3, 4))))
    others = [image.resize((32, 32)), image.crop((0, 0, 8, 8)), image.rotate(90), changed, image.convert("L")]
    assert any(INFO in other.info for other in others)  # as PIL has it
    for other in others:
        assert kept_codes(other, fingerprint, streams) is None
    assert kept_codes(image, "another", streams) is None and kept_codes(image, fingerprint, ["third"]) is None
    assert "image_codes" not in model.processor(images=others) and "pixel_values" not in model.processor(images=image)


def test_questions_are_conversations_of_one_turn(model, pictures):
    asked = [pictures[0], pictures[1:]]
    answers = model.ask(asked, ["two cats", "a small tree"], max_new_tokens=6, min_new_tokens=6)
    for images, question, answer in zip(asked, ["two cats", "a small tree"], answers, strict=True):
        images = images if isinstance(images, list) else [images]
        inputs = model.processor.prompt([{"role": "user", "content": [*images, question]}])
        stop = list(vars(model.config.special).values())
        ids = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, suppress_tokens=stop)
        assert answer == model.tokenizer.decode(ids[0, -6:])
    assert model.ask(pictures[:1], "two cats", max_new_tokens=6, min_new_tokens=6) == answers[:1]


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_that_a_user_types_is_text(model, pictures, token, monkeypatch):
    special, read = set(vars(model.config.special).values()), []
    embed = model.model.embed_tokens.forward
    monkeypatch.setattr(model.model.embed_tokens, "forward", lambda ids: read.append(ids) or embed(ids))

    def typed() -> list[int]:
        """What was read and is no special token, decoded."""
        ids = [i for each in read[:1] for i in each[0].tolist() if i not in special]
        read.clear()
        return model.tokenizer.decode(ids)

    model.draw(f"a {token} b", cfg_scale=1.0)
    assert typed() == f"a {token} b"
    model.describe(pictures[:1], f"a {token} b", max_new_tokens=1)
    assert typed() == f"a {token} b"
    model.ask(pictures[:1], f"a {token} b", max_new_tokens=1)
    assert f"a {token} b" in typed()
    model.edit(pictures[0], f"a {token} b", cfg_scale=1.0, image_scale=1.0)
    assert f"a {token} b" in typed()
    if token != "<image>":  # which is promised to be an image's place there
        model.interleave(f"<image>a {token} b", images=pictures[:1], max_new_tokens=1)
        assert typed() == f"a {token} b"


def labelled(model, pictures) -> dict:
    """A padded batch of two conversations with drawn images, labelled by the template's marks."""
    (drawn,) = model.draw("two", seed=1)
    conversations = [
        [{"role": "user", "content": [pictures[0], "two"]}, {"role": "assistant", "content": ["a", drawn, "cat"]}],
        [{"role": "user", "content": "cats"}, {"role": "assistant", "content": "a tree"}],
    ]
    inputs = model.processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    mask = torch.as_tensor(inputs.pop("assistant_masks")).bool()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~mask, -100)}


def test_the_loss_is_the_mean_of_the_text_and_of_each_stream(model, pictures):
    inputs = labelled(model, pictures)
    labels, special = inputs["labels"], model.config.special
    codes = model.codes_of(inputs["pixel_values"], inputs["image_codes"])
    with torch.no_grad():
        output = model(**inputs)
        plain = model(**{name: value for name, value in inputs.items() if name != "labels"})
    text = [
        -plain.logits[b, s - 1].log_softmax(-1)[labels[b, s]]
        for b, s in itertools.product(range(2), range(1, labels.size(1)))
        if labels[b, s] not in (-100, special.image)
    ]
    assert len(text) > 5 and torch.allclose(output.losses["text"], torch.stack(text).mean(), atol=1e-5)
    for stream, logits in plain.visual_logits.items():
        assert logits.shape[0] == N
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes[stream][1].flatten())
        assert torch.allclose(output.losses[stream], expected, atol=1e-5)
    assert torch.allclose(output.loss, sum(output.losses.values())) and set(output.losses) == {"text", *model.streams}
    unlabelled = labels.masked_fill(labels == special.image, -100)
    with torch.no_grad():
        assert set(model(**inputs | {"labels": unlabelled}).losses) == {"text"}


def test_gradients_are_those_without_checkpointing(model, pictures):
    inputs = labelled(model, pictures)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    try:
        books = {name: buffer.clone() for name, buffer in model.dualtoken.state_dict().items()}
        expected = gradients()
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing and model.model.gradient_checkpointing
        found = gradients()
        assert all(torch.equal(books[name], buffer) for name, buffer in model.dualtoken.state_dict().items())
    finally:
        model.gradient_checkpointing_disable()
        model.eval().zero_grad()
    assert found.keys() == expected.keys()
    assert {name.split(".")[0] for name in found} == {"model", "projector", "heads", "lm_head"}
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 and torch.allclose(found[name], gradient, atol=1e-6), name
