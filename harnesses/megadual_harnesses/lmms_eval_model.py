"""The classes that lmms-eval makes for `--model megadual`.

What they are asked stands in `request.args`; messages and images are made when a batch needs them, so that only its
images are in memory.
"""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from megadual_harnesses.answers import Answers, Sampling, interleaved

# lmms-eval's own default for tasks that name no stop. An answer of several paragraphs would end after the first.
DEFAULT_STOP = "\n\n"


@dataclass
class Asked:
    """One conversation to go on with."""

    conversation: Callable[[], list[dict]]
    sampling: Sampling
    name: str  # tells it from every other one: task, split, document, round, repeat
    length: int  # of its text


class MegaDual(lmms):
    """Chat model: conversations of any turns and images, answered in batches.

    One process for each GPU (`accelerate launch`); lmms-eval gives each its share of the documents. Answers are the
    same for any number of processes and any batch size, sampled ones too.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        system_prompt: str | None = None,
        seed: int = 0,
        max_images: int = 0,
        output_dir: str | None = None,
        cfg_scale: float = 3.0,
        max_batch_size: int | None = None,
    ):
        """`pretrained` is the exported folder. With `max_images` answers may hold so many drawn images each, which
        are written to `output_dir`, and each answer is the JSON {"text": ..., "images": [paths]}."""
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size '{batch_size}' is not a number of conversations; give one, such as 8")
        if max_images and not output_dir:
            raise ValueError(f"max_images={max_images} needs a folder for the images: give output_dir=DIR as well")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = device if device and self._world_size == 1 else self.accelerator.device
        self.batch_size = int(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else None
        self.seed, self.max_images, self.cfg_scale = seed, max_images, cfg_scale
        self.output_dir = Path(output_dir) if output_dir else None
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        self.answers = Answers(pretrained, self.device, dtype, **options)

    def clean(self) -> None:
        """Give the memory back: a judge may come to this GPU."""
        del self.answers
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answers([self._asked(request) for request in requests])

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Every round's answers. The task makes a round's messages of the answers before; None ends it."""
        said: list[list[str]] = [[] for _ in requests]
        told: list = [None] * len(requests)
        waiting = {i: self._asked(request) for i, request in enumerate(requests)}
        while waiting:
            for i, answer in zip(waiting, self._answers(list(waiting.values())), strict=True):
                said[i].append(answer)
            following = {}
            for i in waiting:
                _, doc_to_messages, _, doc_id, task, split = requests[i].args
                document, number = self.task_dict[task][split][doc_id], len(said[i])
                made = doc_to_messages(
                    document, round_idx=number, previous_output=list(said[i]), previous_round_info=told[i]
                )
                messages, ended, _, told[i] = made if isinstance(made, tuple) else (None, True, None, None)
                if not ended:
                    asked = self._asked(requests[i])
                    asked.conversation = lambda messages=messages, task=task: self._conversation(messages, task)
                    asked.name += f"-round{number}"
                    following[i] = asked
            waiting = following
        return said

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks that compare likelihoods need lmms-eval's simple models: add --force_simple")

    def _asked(self, request: Instance) -> Asked:
        context, doc_to_messages, settings, doc_id, task, split = request.args
        return Asked(
            lambda: self._conversation(doc_to_messages(self.task_dict[task][split][doc_id]), task),
            sampling_of(settings),
            f"{task}-{split}-{doc_id}",
            len(context) if isinstance(context, str) else 0,
        )

    def _conversation(self, messages: list[dict], task: str) -> list[dict]:
        """A task's messages as the exported folder's processor takes them."""
        if self.system_prompt:
            messages = self._apply_system_prompt(list(messages), self.system_prompt)
        messages = ChatMessages(messages=messages).to_hf_messages()
        other = {part["type"] for message in messages for part in message["content"]} - {"text", "image"}
        if other:
            raise ValueError(f"task {task} shows {' and '.join(sorted(other))}; MegaDual reads text and images")
        return interleaved(messages)

    def _answers(self, asked: list[Asked]) -> list[str]:
        answers, seen = [""] * len(asked), Counter()
        for each in asked:  # a document that is asked several times (--repeats) gets other random numbers each time
            seen[each.name] += 1
            each.name += f"-{seen[each.name] - 1}"
        with tqdm(total=len(asked), disable=self.rank != 0, desc="Model Responding") as bar:
            for batch in self._batches(asked):
                found = self._batch([asked[i] for i in batch])
                for i, answer in zip(batch, found, strict=True):
                    answers[i] = answer
                bar.update(len(batch))
        return answers

    def _batches(self, asked: list[Asked]) -> Iterator[list[int]]:
        """Indices of what can be answered together, long ones first: what does not fit in memory is seen at once."""
        order = sorted(range(len(asked)), key=lambda i: (repr(asked[i].sampling), -asked[i].length))
        for _, group in groupby(order, key=lambda i: asked[i].sampling):
            alike = list(group)
            yield from (alike[start : start + self.batch_size] for start in range(0, len(alike), self.batch_size))

    def _batch(self, asked: list[Asked]) -> list[str]:
        conversations, seeds = [each.conversation() for each in asked], [self._seed(each.name) for each in asked]
        if not self.max_images:
            return self.answers.texts(conversations, asked[0].sampling, seeds)
        return [self._drawn(*each) for each in zip(asked, conversations, seeds, strict=True)]

    def _drawn(self, asked: Asked, conversation: list[dict], seed: int) -> str:
        """The answer as lmms-eval's scorers of drawn answers read it."""
        text, images = self.answers.texts_and_images(
            conversation, asked.sampling, seed, self.max_images, cfg_scale=self.cfg_scale
        )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        paths = [self.output_dir / f"{asked.name}-{i}.png" for i in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path)
        return json.dumps({"text": text, "images": [str(path) for path in paths]}, ensure_ascii=False)

    def _seed(self, name: str) -> int:
        return self.seed + zlib.crc32(name.encode())


class MegaDualSimple(MegaDual):
    """With --force_simple: a context and its images, answered or compared by the likelihood of given answers."""

    is_simple = True

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        found: list = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
        for start in tqdm(range(0, len(order), self.batch_size), disable=self.rank != 0, desc="Model Responding"):
            batch = order[start : start + self.batch_size]
            conversations, answers = [], []
            for i in batch:
                context, answer, doc_to_visual, doc_id, task, split = requests[i].args
                document = self.task_dict[task][split][doc_id]
                conversations.append(self._shown(context, doc_to_visual, document, task))
                answers.append(answer if isinstance(answer, str) else answer(document))
            for i, result in zip(batch, self.answers.loglikelihoods(conversations, answers), strict=True):
                found[i] = result
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        raise NotImplementedError("tasks of several rounds need lmms-eval's chat models: leave --force_simple out")

    def _asked(self, request: Instance) -> Asked:
        context, settings, doc_to_visual, doc_id, task, split = request.args
        return Asked(
            lambda: self._shown(context, doc_to_visual, self.task_dict[task][split][doc_id], task),
            sampling_of(settings),
            f"{task}-{split}-{doc_id}",
            len(context),
        )

    def _shown(self, context: str, doc_to_visual: Callable | None, document: dict, task: str) -> list[dict]:
        visuals = (doc_to_visual(document) if callable(doc_to_visual) else None) or []
        images = [{"type": "image", "url": image} for image in visuals]
        return self._conversation([{"role": "user", "content": [*images, {"type": "text", "text": context}]}], task)


def sampling_of(settings: dict) -> Sampling:
    """lmms-eval's generation_kwargs. `do_sample` decides where it is given, as in transformers: MM-Vet's task has a
    temperature of 0.2 and does not want it. Else a temperature above 0 does."""
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    temperature, sampled = settings.get("temperature"), settings.get("do_sample")
    if sampled is None:
        sampled = bool(temperature)
    temperature = (1.0 if temperature is None else float(temperature)) if sampled else 0.0
    given = {key: settings[key] for key in ("max_new_tokens", "top_p", "top_k", "num_beams") if settings.get(key)}
    stops = tuple(stop for stop in until if stop and stop != DEFAULT_STOP)
    return Sampling(temperature=temperature, until=stops, **given)
