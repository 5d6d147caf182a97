"""Answers of an exported model to batches of conversations, whichever harness asks.

Shape suffixes: B conversations, S positions, V the vocabulary.
"""

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

IMAGE = "<image>"  # as benchmarks spell the place of an image in a question


class Sampling(NamedTuple):
    """How an answer is written. At temperature 0 the likeliest token is taken; top_k 0 keeps all."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    until: tuple[str, ...] = ()  # an answer ends before any of these


class Answers:
    """The model of an exported folder (or hub id) on one device.

    Conversations are lists of messages as the folder's processor takes them. An answer depends on its conversation and
    its seed alone, not on those beside it in a batch, but for rounding, which in bf16 may tip a token.
    """

    def __init__(self, folder: str, device: str | torch.device, dtype: str = "auto", **options):
        found = AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type
        if found != "megadual":
            raise ValueError(
                f"'{folder}' holds a model of type '{found}'; give the --output of checkpoints_tools/convert_to_hf.py"
            )
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True, **options)
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def texts(self, conversations: list[list[dict]], sampling: Sampling, seeds: list[int]) -> list[str]:
        """A text for each conversation, all written in one batch."""
        if sampling.temperature and sampling.num_beams > 1:
            raise ValueError(
                f"temperature {sampling.temperature:g} with num_beams {sampling.num_beams}: beams are searched, not "
                "sampled; set temperature to 0 or num_beams to 1"
            )
        inputs = self.processor.prompt(conversations).to(self.model.device)
        stops = {"stop_strings": list(sampling.until), "tokenizer": self.processor.tokenizer} if sampling.until else {}
        written_BS = self.model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            num_beams=sampling.num_beams,
            do_sample=False,
            logits_processor=_drawing(sampling, seeds),
            **stops,
        )
        new_BS = written_BS[:, inputs["input_ids"].size(1) :]
        return [_before(text, sampling.until) for text in self.processor.batch_decode(new_BS, skip_special_tokens=True)]

    def texts_and_images(
        self, conversation: list[dict], sampling: Sampling, seed: int, max_images: int, **drawing
    ) -> tuple[str, list[Image.Image]]:
        """An answer in which the model draws where it wants to; `drawing` are keywords of `interleave`."""
        answer = self.model.interleave(
            conversation,
            max_new_tokens=sampling.max_new_tokens,
            max_images=max_images,
            text_temperature=sampling.temperature,
            text_top_p=sampling.top_p,
            text_top_k=sampling.top_k or 50,
            seed=seed,
            **drawing,
        )
        text = "".join(part for part in answer if isinstance(part, str))
        return _before(text, sampling.until), [part for part in answer if not isinstance(part, str)]

    @torch.inference_mode()
    def loglikelihoods(self, conversations: list[list[dict]], answers: list[str]) -> list[tuple[float, bool]]:
        """How likely each answer is as all that is said next, and whether it is what greedy decoding says.

        The mark that ends it counts, as it has a loss in training: "one" is not "one hundred".
        """
        said = [
            [*conversation, {"role": "assistant", "content": answer}]
            for conversation, answer in zip(conversations, answers, strict=True)
        ]
        inputs = self.processor.apply_chat_template(
            said, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        answered_BS = _last_run(torch.as_tensor(inputs.pop("assistant_masks")).bool())[:, 1:].to(self.model.device)
        inputs = inputs.to(self.model.device)
        logits_BSV = self.model(**inputs, position_ids=_positions(inputs["attention_mask"])).logits[:, :-1].float()
        next_BS = inputs["input_ids"][:, 1:]
        likelihood_BS = logits_BSV.log_softmax(-1).gather(-1, next_BS[..., None])[..., 0]
        summed_B = (likelihood_BS * answered_BS).sum(1)
        greedy_B = ((logits_BSV.argmax(-1) == next_BS) | ~answered_BS).all(1)
        return list(zip(summed_B.tolist(), greedy_B.tolist(), strict=True))


def interleaved(messages: list[dict]) -> list[dict]:
    """Messages whose images stand where their texts spell `<image>`, where it is spelled once for each image.

    Many benchmarks give a question's images apart from its text.
    """
    return [message | {"content": _placed(message["content"])} for message in messages]


def _placed(content: str | list[dict]) -> str | list[dict]:
    if isinstance(content, str):
        return content
    images = [part for part in content if part["type"] == "image"]
    texts = [part for part in content if part["type"] == "text"]
    if not images or sum(part["text"].count(IMAGE) for part in texts) != len(images):
        return content
    placed, waiting = [], iter(images)
    for part in texts:
        for i, text in enumerate(part["text"].split(IMAGE)):
            placed += [next(waiting)] if i else []
            placed += [{"type": "text", "text": text}] if text else []
    return placed


class _Draw(LogitsProcessor):
    """Leaves each row one token, drawn with random numbers of that row: none depends on the rows beside it."""

    def __init__(self, seeds: list[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative_BV = scores.float().softmax(-1).cumsum(-1)
        number_B = torch.stack([1 - torch.rand((), generator=each) for each in self.generators])  # in (0, 1]
        number_B = number_B.to(scores.device) * cumulative_BV[:, -1]
        tokens_B = (cumulative_BV < number_B[:, None]).sum(-1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)


def _drawing(sampling: Sampling, seeds: list[int]) -> LogitsProcessorList:
    if not sampling.temperature:
        return LogitsProcessorList()
    steps = [TemperatureLogitsWarper(float(sampling.temperature))]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(float(sampling.top_p))] if sampling.top_p < 1 else []
    return LogitsProcessorList([*steps, _Draw(seeds)])


def _before(text: str, until: tuple[str, ...]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text


def _last_run(mask_BS: Tensor) -> Tensor:
    """Of each row's runs of true only the last: the last answer, not those of the turns before."""
    before_BS = torch.nn.functional.pad(mask_BS[:, :-1], (1, 0))
    run_BS = (mask_BS & ~before_BS).cumsum(1)
    return mask_BS & (run_BS == run_BS[:, -1:])


def _positions(kept_BS: Tensor) -> Tensor:
    """Rotary positions of prompts padded at the left."""
    return (kept_BS.cumsum(1) - 1).clamp(min=0)
