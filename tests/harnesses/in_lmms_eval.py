"""Requests as lmms-eval makes them, on the classes that it finds for `--model megadual`.

test_lmms_eval.py runs this file in lmms-eval's environment, where megadual is not installed, and gives the export.
"""

import importlib.util
import json
import os

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from megadual_harnesses.answers import Sampling
from megadual_harnesses.lmms_eval_model import sampling_of
from PIL import Image
from transformers import AutoModelForCausalLM

EXPORT = os.environ["MEGADUAL_TEST_EXPORT"]
PICTURES = [Image.effect_mandelbrot((40, 30 + 2 * i), (-2, -1.5, 1, 1.5), 5 + 3 * i) for i in range(6)]
QUESTIONS = ["Is it?", "Is there a red apple in the image?", "What is in the image?\nA. a cat\nB. a dog", "Why? " * 9]
DOCUMENTS = [
    {"image": PICTURES[i % len(PICTURES)], "question": f"{QUESTIONS[i % len(QUESTIONS)]} {i}"} for i in range(11)
]


@pytest.fixture(scope="module")
def direct():
    """The model by itself, on its own way of writing, one conversation at a time."""
    return AutoModelForCausalLM.from_pretrained(EXPORT, trust_remote_code=True).eval()


def shown(document):
    content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": content}]


def model(simple=False, documents=DOCUMENTS, **arguments):
    made = get_model("megadual", force_simple=simple)(pretrained=EXPORT, device="cpu", **arguments)
    made.task_dict = {"task": {"test": documents}}
    return made


def instances(kind, made):
    """A request for each document, whose arguments `made(i)` gives without document, task and split."""
    return [
        Instance(kind, (*made(i), i, "task", "test"), 0, {"task": "task", "doc_id": i, "repeats": 1})
        for i in range(len(DOCUMENTS))
    ]


def chat_requests(settings, messages=shown):
    return instances("generate_until", lambda i: (DOCUMENTS[i]["question"], messages, dict(settings)))


def test_megadual_is_not_installed():
    assert importlib.util.find_spec("megadual") is None


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.95}, {"do_sample": True, "top_k": 5}])
def test_answers_are_the_same_for_any_batch_size(settings):
    requests = chat_requests({"max_new_tokens": 12, "until": ["\n\n"], **settings})
    answers = [model(batch_size=size).generate_until(requests) for size in (1, 4, 11)]
    assert answers[0] == answers[1] == answers[2] and len(set(answers[0])) > 1


def test_greedy_answers_are_those_of_the_model(direct):
    said = model(batch_size=4).generate_until(chat_requests({"max_new_tokens": 12, "temperature": 0}))
    assert said == [
        direct.ask([document["image"]], document["question"], max_new_tokens=12)[0] for document in DOCUMENTS
    ]


def test_the_generic_model_takes_the_folder(direct):
    """lmms-eval's own. It ends answers at the tokenizer's end token alone, and its bf16 may tip a token."""
    generic = get_model("huggingface")(pretrained=EXPORT, trust_remote_code=True, device="cpu", device_map="cpu")
    generic.task_dict = {"task": {"test": DOCUMENTS}}
    said = [each.text for each in generic.generate_until(chat_requests({"max_new_tokens": 12}))]
    greedy = [direct.ask([document["image"]], document["question"], max_new_tokens=12)[0] for document in DOCUMENTS]
    alike = sum(left == right for left, right in zip(said, greedy, strict=True))
    assert alike > 0.6 * len(DOCUMENTS), list(zip(said, greedy, strict=True))


def test_sampled_answers_depend_on_the_seed_and_differ_between_repeats():
    settings = {"max_new_tokens": 12, "temperature": 3.0}
    requests = [request for request in chat_requests(settings) for _ in range(2)]
    said = model(batch_size=4).generate_until(requests)
    assert said[::2] != said[1::2]
    assert said == model(batch_size=7).generate_until(requests)
    assert said != model(batch_size=4, seed=1).generate_until(requests)


@pytest.mark.parametrize(
    "settings, temperature",
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 0.2}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0}, 0.0),
    ],
)
def test_do_sample_decides_where_it_is_given(settings, temperature):
    found = sampling_of({**settings, "until": ["\n\n", "ASSISTANT:"], "image_aspect_ratio": "pad", "top_p": None})
    assert found == Sampling(temperature=temperature, until=("ASSISTANT:",))


def test_an_answer_ends_before_what_the_task_names():
    whole = model(batch_size=4).generate_until(chat_requests({"max_new_tokens": 12}))
    stop = next(answer for answer in whole if len(answer) > 1)[1]
    ended = model(batch_size=4).generate_until(chat_requests({"max_new_tokens": 12, "until": [stop]}))
    assert ended == [answer.split(stop)[0] for answer in whole] != whole


def test_conversations_of_several_turns_and_images(direct):
    def several(document):
        before = [*shown(document), {"role": "assistant", "content": [{"type": "text", "text": "no"}]}]
        text = {"type": "text", "text": f"First <image> then <image>: {document['question']}"}
        pictures = [{"type": "image", "url": picture} for picture in PICTURES[:2]]
        return [*before, {"role": "user", "content": [*pictures, text]}]

    said = model(batch_size=4, system_prompt="Be short.").generate_until(chat_requests({"max_new_tokens": 12}, several))
    for document, answer in zip(DOCUMENTS, said, strict=True):
        conversation = [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [document["image"], document["question"]]},
            {"role": "assistant", "content": "no"},
            {
                "role": "user",
                "content": ["First ", PICTURES[0], " then ", PICTURES[1], f": {document['question']}"],
            },
        ]
        assert "".join(direct.interleave(conversation, max_images=0, max_new_tokens=12)) == answer


def test_rounds_are_made_of_the_answers_before():
    def rounds(document, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return shown(document)
        assert len(previous_output) == round_idx and previous_round_info == (None if round_idx == 1 else round_idx - 1)
        if round_idx > int(document["question"].split()[-1]) % 3:
            return None, True, previous_output, None
        follow = shown(document | {"question": f"You said {previous_output[-1]}. Sure?"})
        return follow, False, previous_output, round_idx

    asked = instances(
        "generate_until_multi_round", lambda i: (DOCUMENTS[i]["question"], rounds, {"max_new_tokens": 12})
    )
    said = model(batch_size=4).generate_until_multi_round(asked)
    assert [len(of) for of in said] == [1 + i % 3 for i in range(len(DOCUMENTS))]
    follow = [document | {"question": f"You said {of[0]}. Sure?"} for document, of in zip(DOCUMENTS, said, strict=True)]
    second = model(batch_size=2, documents=follow).generate_until(chat_requests({"max_new_tokens": 12}))
    assert [of[1] for of in said if len(of) > 1] == [
        answer for answer, of in zip(second, said, strict=True) if len(of) > 1
    ]


def test_likelihoods_of_answers(direct):
    """Against one forward pass for each, without padding."""
    choices = ["yes", "no", "a red apple"]
    asked = [
        Instance(
            "loglikelihood",
            (document["question"], f" {choice}", lambda document: [document["image"]], i, "task", "test"),
            0,
            {"task": "task", "doc_id": i, "repeats": 1},
        )
        for i, document in enumerate(DOCUMENTS)
        for choice in choices
    ]
    found = model(simple=True, batch_size=5).loglikelihood(asked)
    expected = []
    for document in DOCUMENTS:
        prompt = direct.processor.prompt([{"role": "user", "content": [document["image"], document["question"]]}])
        for choice in choices:
            ids = direct.tokenizer(choice).input_ids + [direct.config.special.im_end]
            whole = torch.cat([prompt["input_ids"], torch.tensor([ids])], dim=1)
            with torch.no_grad():
                logits = direct(input_ids=whole, pixel_values=prompt["pixel_values"]).logits[0, -len(ids) - 1 : -1]
            likelihood = logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
            expected.append((pytest.approx(likelihood, abs=1e-4), logits.argmax(-1).tolist() == ids))
    assert found == expected and {greedy for _, greedy in found} == {True, False}


def test_simple_requests_are_answered_as_chats_are():
    settings = {"max_new_tokens": 12}
    asked = instances(
        "generate_until", lambda i: (DOCUMENTS[i]["question"], settings, lambda document: [document["image"]])
    )
    assert model(simple=True, batch_size=4).generate_until(asked) == model(batch_size=4).generate_until(
        chat_requests(settings)
    )


def test_drawn_answers_are_files(tmp_path):
    made = model(batch_size=4, max_images=1, output_dir=str(tmp_path / "drawn"))
    llm = made.answers.model
    with torch.no_grad():  # draws where it would say "yes", and says it then
        yes = llm.tokenizer("yes").input_ids[0]
        llm.lm_head.weight[llm.config.special.image_gen_start] = 1.5 * llm.lm_head.weight[yes]
    said = [json.loads(answer) for answer in made.generate_until(chat_requests({"max_new_tokens": 6}))]
    images = [path for answer in said for path in answer["images"]]
    assert images and sorted(images) == sorted(map(str, (tmp_path / "drawn").iterdir()))
    assert {Image.open(path).size for path in images} == {(16, 16)}
    assert all(isinstance(answer["text"], str) for answer in said)


def test_what_cannot_be_is_told(tmp_path):
    def film(document):
        return [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}, {"type": "text", "text": "?"}]}]

    with pytest.raises(ValueError, match="task task shows video"):
        model().generate_until(chat_requests({}, film))
    with pytest.raises(ValueError, match="batch_size 'auto' is not a number"):
        model(batch_size="auto")
    with pytest.raises(ValueError, match="output_dir"):
        model(max_images=1)
    with pytest.raises(ValueError, match="set temperature to 0 or num_beams to 1"):
        model().generate_until(chat_requests({"temperature": 1.0, "num_beams": 2}))
    with pytest.raises(NotImplementedError, match="--force_simple"):
        model().loglikelihood([])
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="holds a model of type 'gpt2'"):
        get_model("megadual")(pretrained=str(tmp_path))
