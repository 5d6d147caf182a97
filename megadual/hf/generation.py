"""What an exported model is for: describing images, drawing and editing them, and answering in text and images.

Shape suffixes: R rows (B images, then the same without what guides them), S positions of a prompt, N positions of an
image, D a stream's code depth, T streams, K a stream's codebook size, H the LLM's width.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from megadual.hf.decoding import whole_slots
from megadual.hf.drawn_codes import keep_codes
from megadual.hf.processing_megadual import MegaDualProcessor, checked, escaped
from megadual.hf.rollout import Rollout
from megadual.streams import IMAGE
from megadual.vision.tokenizer import to_image

BATCH = 32  # images drawn at once; more are drawn in turn
POSITIONS_AHEAD = 8  # where progress is shown, the host waits for the GPU every so many positions


Choose = Callable[[int, str, int, Tensor], Tensor]


class Guidance(NamedTuple):
    """How images are guided: away from a prompt that lacks what is asked for."""

    scale: float  # towards all of the prompt
    image_scale: float | None = None  # towards the images of the last user's turn; None: they go with its text

    @property
    def without(self) -> list[tuple[bool, bool]]:
        """The prompts that are read beside the whole one: whether without the turn's text, without its images.

        Those that would weigh nothing are left out.
        """
        if self.image_scale is None or self.image_scale == self.scale:
            return [] if self.scale == 1 else [(True, True)]
        return [(True, False)] if self.image_scale == 1 else [(True, False), (True, True)]


class Generation:
    """`describe`, `ask`, `draw`, `edit` and `interleave` of MegaDualForCausalLM. All need the model on one device.

    ValueError, before anything is computed, where a prompt is longer than the model's positions
    (`max_position_embeddings`), with the image that is drawn behind it, or can't be sampled as asked for.

    Images that are returned keep their codes (`drawn_codes.py`): as part of a later prompt they are read as these. One
    that was changed, by its size or any pixel, is encoded like any other image.
    """

    _kept: tuple[object, Rollout | None] = (None, None)  # the last rollout, whose captured graphs are worth keeping

    @cached_property
    def tokenizer(self):
        """The text tokenizer of the folder that the model came from."""
        return PreTrainedTokenizerFast.from_pretrained(self.config._name_or_path)

    @cached_property
    def processor(self) -> MegaDualProcessor:
        """Makes `input_ids` and `pixel_values` of texts, images and messages."""
        return MegaDualProcessor(
            self.tokenizer,
            image_size=self.dualtoken.config.image_size,
            image_positions=self._image_positions,
            dualtoken=self._code_fingerprint,
            streams=list(self.streams),
        )

    @cached_property
    def _code_fingerprint(self) -> str:
        return self.dualtoken.fingerprint()

    def describe(
        self,
        images: list[Image.Image],
        prompt: str = "",
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[str]:
        """A caption for each image, going on from `prompt`. At temperature 0 the likeliest token is taken."""
        inputs = self.processor(text=[IMAGE + escaped(prompt)] * len(images), images=images)
        return self._texts(inputs, max_new_tokens, min_new_tokens, temperature, top_k, top_p, seed)

    def ask(
        self,
        images: list[Image.Image | list[Image.Image]],
        question: str | list[str],
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[str]:
        """An answer for each image, or each list of images, to one question or to its own: a conversation of one turn.

        At temperature 0 the likeliest token is taken.
        """
        questions = [question] * len(images) if isinstance(question, str) else question
        inputs = self.processor.prompt([self._asked(*asked) for asked in zip(images, questions, strict=True)])
        return self._texts(inputs, max_new_tokens, min_new_tokens, temperature, top_k, top_p, seed)

    @staticmethod
    def _asked(images: Image.Image | list[Image.Image], text: str) -> list[dict]:
        """A conversation that begins with images and a text."""
        shown = list(images) if isinstance(images, (list, tuple)) else [images]
        return [{"role": "user", "content": [*shown, text]}]

    @torch.no_grad()
    def _texts(
        self,
        inputs,
        max_new_tokens: int,
        min_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int | None,
    ) -> list[str]:
        """What the processor's inputs go on with, row by row, at most up to the model's last position."""
        self._check_sampling(temperature, top_k, top_p, seed, coldest=0)
        embeds_BSH, kept_BS, _ = self._read(inputs)
        count, length = kept_BS.shape
        max_new_tokens = min(max_new_tokens, self._most_positions - length)
        rollout = self._rollout(count, 1, length + max_new_tokens, text_top_k=top_k if temperature else 1, draws=False)
        self._set_text(rollout, temperature, top_p, seed)
        rollout.start(embeds_BSH, kept_BS)
        stops, texts = self._stops, [[] for _ in range(count)]
        rollout.bias_V[list(stops)] = -torch.inf
        unfinished = set(range(count))
        for step in range(max_new_tokens):
            if step == min_new_tokens:
                rollout.bias_V[list(stops)] = 0.0
            rollout.write()
            for i, token in enumerate(rollout.tokens_B.tolist()):
                if i in unfinished and token not in stops:
                    texts[i].append(token)
                else:
                    unfinished.discard(i)
            if not unfinished:
                break
        return self.tokenizer.batch_decode(texts, skip_special_tokens=True)

    @torch.no_grad()
    def draw(
        self,
        prompt: str | list[str],
        n: int = 1,
        cfg_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int | None = None,
        progress: bool = False,
    ) -> list[Image.Image]:
        """`n` images of a prompt, or of each of several, one prompt's after another's.

        Image i comes from `seed` + i and its prompt alone: whatever else is drawn with it changes it by rounding
        only, which in bf16 may tip a code. `progress` shows the positions drawn.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        captions = [self._ids(text.strip()) for text in prompts for _ in range(n)]
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, progress=progress)
        return self._in_turn(
            len(captions), seed, lambda rows, seed: self.draw_codes(captions[rows], cfg_scale, seed=seed, **sampling)
        )

    @torch.no_grad()
    def draw_codes(
        self,
        captions: list[list[int]],
        cfg_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int = 0,
        choose: Choose | None = None,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """Codes (B, N, D) of an image for each caption (token ids), by stream.

        With `cfg_scale` s != 1 the logits are u + s (c - u) at every depth, u those of the same image without its
        caption. `choose(position, stream, d, logits (B, K))`, where given, chooses the codes (B,) of a depth.
        """
        special, guidance = self.config.special, Guidance(cfg_scale)
        longest = max(map(len, captions)) + 1
        self._check_length(longest, draws=True)
        padding = [longest - 1 - len(caption) for caption in captions]
        ids_BS = torch.tensor(
            [[0] * pad + [*caption, special.image_gen_start] for pad, caption in zip(padding, captions, strict=True)],
            device=self.device,
        )
        places_S, padding_B = torch.arange(longest, device=self.device), torch.tensor(padding, device=self.device)
        kept = [places_S >= padding_B[:, None]]
        kept += [(places_S == longest - 1).expand_as(ids_BS)] * len(guidance.without)
        embeds_BSH = self.model.embed_tokens(ids_BS)
        return self._codes(embeds_BSH, kept, guidance, temperature, top_k, top_p, seed, choose, progress)

    @torch.no_grad()
    def edit(
        self,
        image: Image.Image | list[Image.Image | list[Image.Image]],
        instruction: str | list[str],
        n: int = 1,
        cfg_scale: float = 3.0,
        image_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int | None = None,
        progress: bool = False,
    ) -> list[Image.Image]:
        """`n` images of each image (or list of images) changed as one instruction says, or its own of several.

        `cfg_scale` guides towards the instruction, `image_scale` towards the source: with more of it less is changed.
        The seed is as in `draw`.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        instructions = [instruction] * len(images) if isinstance(instruction, str) else list(instruction)
        edits = list(zip(images, instructions, strict=True))
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p, progress=progress)

        def codes(rows: slice, seed: int) -> dict[str, Tensor]:
            each = range(len(edits) * n)[rows]
            first = each[0] // n
            several = edits[first : each[-1] // n + 1]
            repeats = [i // n - first for i in each]
            return self.edit_codes(several, cfg_scale, image_scale, seed=seed, repeats=repeats, **options)

        return self._in_turn(len(edits) * n, seed, codes)

    @torch.no_grad()
    def edit_codes(
        self,
        edits: list[tuple[Image.Image | list[Image.Image], str]],
        cfg_scale: float = 3.0,
        image_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int = 0,
        repeats: list[int] | None = None,
        choose: Choose | None = None,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """Codes (B, N, D), by stream, of the images that edits (source, instruction) lead to; B are the indices in
        `repeats`, None: each once.

        The logits are u + image_scale (i - u) + cfg_scale (c - i) at every depth: c those of the whole prompt, i
        without the instruction, u without the source image as well (InstructPix2Pix). `choose` is as in `draw_codes`.
        """
        inputs = self.processor.prompt([self._asked(*edit) for edit in edits])
        start = torch.full((len(edits), 1), self.config.special.image_gen_start)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], start], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(start)], dim=1)
        embeds_BSH, kept_BS, ids_BS = self._read(inputs, draws=True)
        guidance = Guidance(cfg_scale, image_scale)
        kept = [kept_BS, *(kept_BS & ~self._dropped(ids_BS, *without) for without in guidance.without)]
        if repeats is not None:
            embeds_BSH, kept = embeds_BSH[repeats], [kept_BS[repeats] for kept_BS in kept]
        return self._codes(embeds_BSH, kept, guidance, temperature, top_k, top_p, seed, choose, progress)

    @torch.no_grad()
    def interleave(
        self,
        prompt: str | list[dict],
        images: list[Image.Image] | None = None,
        max_new_tokens: int = 256,
        max_images: int | None = None,
        text_temperature: float = 0.0,
        text_top_k: int = 50,
        text_top_p: float = 1.0,
        cfg_scale: float = 3.0,
        image_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int | None = None,
        progress: bool = False,
    ) -> list[str | Image.Image]:
        """An answer of texts and images in the order written; an image begins where the model says so.

        `prompt` is a text with `<image>` for each of `images`, or a conversation so far (see the processor's `prompt`).
        With the answer it goes on: `[*prompt, {"role": "assistant", "content": answer}, {"role": "user", ...}]`.

        Images are guided to all that stands before them: in a conversation from the same one with nothing in the
        last user's turn; where `image_scale` is given, with its images alone and from nothing, as in `edit`; in a text
        from nothing before them. At most `max_images` images: by default 4 of a model that draws, none of another. The
        answer ends at the model's last position, and no image begins that would not fit before it.
        """
        if max_images is None:
            max_images = 4 if self.draws else 0
        if max_images:
            self._check_draws()
        self._check_sampling(temperature, top_k, top_p, seed)
        self._check_sampling(text_temperature, text_top_k, text_top_p, seed, coldest=0)
        if isinstance(prompt, str):
            guidance = Guidance(cfg_scale)
            inputs = self.processor(text=IMAGE.join(map(escaped, prompt.split(IMAGE))), images=images)
        else:
            guidance = Guidance(cfg_scale, image_scale)
            inputs = self.processor.prompt(prompt, images)
        embeds_BSH, kept_BS, ids_BS = self._read(inputs)
        kept = [kept_BS]
        for without in guidance.without if max_images else []:
            kept.append(kept_BS if isinstance(prompt, str) else kept_BS & ~self._dropped(ids_BS, *without))
        seed = self._seed(seed)
        special, image = self.config.special, self._image_positions + 2  # with the tokens around it
        left = self._most_positions - ids_BS.size(1)
        slots = ids_BS.size(1) + min(left, max_new_tokens + max_images * image)
        text_top_k = text_top_k if text_temperature else 1
        rollout = self._rollout(1, len(kept), slots, text_top_k=text_top_k, code_top_k=top_k, draws=max_images > 0)
        self._set_text(rollout, text_temperature, text_top_p, seed)
        rollout.start(embeds_BSH.expand(len(kept), -1, -1), torch.cat(kept))

        answer, text, drawn = [], [], 0
        for _ in range(max_new_tokens):
            if not left:
                break
            rollout.bias_V[special.image_gen_start] = 0.0 if drawn < max_images and image <= left else -torch.inf
            rollout.write()
            token = int(rollout.tokens_B)
            if token in self._stops:
                break
            if token != special.image_gen_start:
                text.append(token)
                left -= 1
                continue
            answer += [self.tokenizer.decode(text, skip_special_tokens=True)] if text else []
            self._set_codes(rollout, guidance, temperature, top_p, seed + drawn)
            if isinstance(prompt, str):
                rollout.llm.forget(slice(1, None))
            answer += self._images(self._draw_positions(rollout, progress))
            rollout.write()  # the last position is read as well
            rollout.feed(special.image_gen_end)
            text, drawn, left = [], drawn + 1, left - image
        return answer + ([self.tokenizer.decode(text, skip_special_tokens=True)] if text else [])

    @property
    def _most_positions(self) -> int:
        """As many as the model was trained on at once: no prompt and no answer goes beyond them."""
        return self.config.text_config.max_position_embeddings

    @property
    def _image_positions(self) -> int:
        rows, columns = self.dualtoken.config.grid
        return rows * columns

    def _check_length(self, prompt: int, draws: bool = False) -> None:
        """ValueError where a prompt, with the image that is drawn behind it, is longer than the model's positions."""
        image = self._image_positions if draws else 0
        if prompt + image > self._most_positions:
            and_image = f" and an image {image}" if draws else ""
            raise ValueError(f"the prompt takes {prompt} positions{and_image}; the model has {self._most_positions}")

    @staticmethod
    def _check_sampling(temperature: float, top_k: int, top_p: float, seed: int | None, coldest: float = 1e-3) -> None:
        """ValueError for what can't be sampled with, nan among it."""
        bounds = {
            "temperature": (temperature, coldest, 1e6), "top_k": (top_k, 1, 2**31), "top_p": (top_p, 1e-6, 1e6),
            "seed": (seed or 0, 0, 2**62),
        }  # fmt: skip
        for name, (value, low, high) in bounds.items():
            if not low <= value <= high:
                raise ValueError(f"{name} {value}: it must be {low:g} to {high:g}")

    def _read(self, inputs, draws: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The processor's inputs embedded (B, S, H), which positions are no padding (B, S), and their ids (B, S).

        ValueError where they, with an image if one is drawn behind them, are longer than the model's positions.
        """
        self._check_length(inputs["input_ids"].size(1), draws)
        inputs = inputs.to(self.device)
        codes = self.codes_of(inputs.get("pixel_values"), inputs.get("image_codes"))
        ids_BS = inputs["input_ids"]
        return self.embed(ids_BS, codes), inputs["attention_mask"].bool(), ids_BS

    def _dropped(self, ids_BS: Tensor, text: bool, images: bool) -> Tensor:
        """(B, S) the positions of the last user's turn that are left out for guidance, as training leaves them out:
        its text, its images with the tokens around them, or both. The marks of the chat stay."""
        special, header = self.config.special, self.processor.user_header
        dropped_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        for dropped_S, ids in zip(dropped_BS, ids_BS.tolist(), strict=True):
            begins = [i + len(header) for i in range(len(ids)) if ids[i : i + len(header)] == header]
            if not begins:
                continue
            end = ids.index(special.im_end, begins[-1])
            turn_S = torch.tensor(ids[begins[-1] : end], dtype=torch.int64)
            ends = turn_S == special.image_end
            in_image = (turn_S == special.image_start).cumsum(0) > ends.cumsum(0) - ends.long()
            dropped_S[begins[-1] : end] = (in_image & images) | (~in_image & text)
        return dropped_BS

    def _codes(
        self,
        embeds_BSH: Tensor,
        kept: list[Tensor],
        guidance: Guidance,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        choose: Choose | None,
        progress: bool,
    ) -> dict[str, Tensor]:
        """Codes (B, N, D) by stream of images that begin behind prompts; of each branch `kept` are the positions that
        it reads, (B, S)."""
        self._check_sampling(temperature, top_k, top_p, seed)
        count, length = kept[0].shape
        options = dict(code_top_k=top_k, writes=False, choose=choose)
        rollout = self._rollout(count, len(kept), length + self._image_positions, **options)
        self._set_codes(rollout, guidance, temperature, top_p, seed)
        rollout.start(embeds_BSH.repeat(len(kept), 1, 1), torch.cat(kept))
        return self._draw_positions(rollout, progress)

    def _in_turn(
        self, count: int, seed: int | None, codes: Callable[[slice, int], dict[str, Tensor]]
    ) -> list[Image.Image]:
        """`count` images, at most BATCH at once: `codes(rows, seed)` of each."""
        self._check_draws()
        seed, images = self._seed(seed), []
        for start in range(0, count, BATCH):
            images += self._images(codes(slice(start, min(start + BATCH, count)), seed + start))
        return images

    @staticmethod
    def _seed(seed: int | None) -> int:
        return int(torch.randint(2**31, ())) if seed is None else seed

    def _draw_positions(self, rollout: Rollout, progress: bool) -> dict[str, Tensor]:
        rollout.position.zero_()
        positions = len(rollout.code_uniform_NDTB)
        for position in tqdm(range(positions), unit="position", disable=not progress, mininterval=0.5):
            rollout.draw()
            if progress and self.device.type == "cuda" and position % POSITIONS_AHEAD == 0:
                torch.cuda.synchronize()
        return {stream: codes_NBD.transpose(0, 1).clone() for stream, codes_NBD in rollout.codes_NBD.items()}

    def _images(self, codes_BND: dict[str, Tensor]) -> list[Image.Image]:
        """The pictures of codes, which they keep."""
        grid = self.dualtoken.config.grid
        pictures = self.dualtoken.decode({stream: codes.unflatten(1, grid) for stream, codes in codes_BND.items()})
        on_host = {stream: codes.cpu() for stream, codes in codes_BND.items()}
        return [
            keep_codes(
                to_image(picture), self._code_fingerprint, {stream: codes[i] for stream, codes in on_host.items()}
            )
            for i, picture in enumerate(pictures)
        ]

    @property
    def draws(self) -> bool:
        """Whether the model writes all streams that pictures are decoded from."""
        needed = self.dualtoken.config.feeding("picture")
        return bool(needed) and set(needed) <= set(self.streams)

    def _check_draws(self) -> None:
        if not self.draws:
            needed = self.dualtoken.config.feeding("picture")
            raise ValueError(
                f"this model can't draw: pictures are decoded from the streams {needed}, it writes {list(self.streams)}"
            )

    def _ids(self, text: str) -> list[int]:
        """Special tokens spelled in a text are text."""
        return self.tokenizer(checked(text), add_special_tokens=False, split_special_tokens=True).input_ids

    @property
    def _stops(self) -> set[int]:
        """Tokens that end a text."""
        configured = self.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        return {self.config.special.end_of_text, self.config.special.im_end, *configured} - {None}

    def _rollout(self, images: int, branches: int, slots: int, **options) -> Rollout:
        """A rollout, the last one where it fits."""
        key = (images, branches, whole_slots(slots), tuple(options.items()), self._weights_as_they_are())
        if self._kept[0] != key:
            self._kept = (None, None)  # frees the other's cache first
            self._kept = (key, Rollout(self, images, branches, slots, **options))
        return self._kept[1]

    def _weights_as_they_are(self) -> tuple:
        """Changes with the weights' places, which captured graphs read, and their values, which a rollout copies."""
        return tuple((parameter.data_ptr(), parameter._version) for parameter in self.parameters())

    def _set_text(self, rollout: Rollout, temperature: float, top_p: float, seed: int | None) -> None:
        special = self.config.special
        rollout.bias_V.zero_()  # images are drawn, not spelled
        rollout.bias_V[list(set(vars(special).values()) - {special.end_of_text, special.im_end})] = -torch.inf
        rollout.text_sampler.temperature.fill_(temperature or 1.0)
        rollout.text_sampler.top_p.fill_(top_p)
        if temperature:
            seed = self._seed(seed)
            length, texts = rollout.text_uniform_LB.shape
            numbers = [torch.rand(length, generator=torch.Generator().manual_seed(seed + i)) for i in range(texts)]
            rollout.text_uniform_LB.copy_(torch.stack(numbers, dim=1))

    def _set_codes(self, rollout: Rollout, guidance: Guidance, temperature: float, top_p: float, seed: int) -> None:
        positions, depth, streams, images = rollout.code_uniform_NDTB.shape
        numbers = [
            torch.rand(positions, streams, depth, generator=torch.Generator().manual_seed(seed + i))
            for i in range(images)
        ]
        rollout.code_uniform_NDTB.copy_(torch.stack(numbers).permute(1, 3, 2, 0))
        rollout.scale.fill_(guidance.scale)
        rollout.image_scale.fill_(guidance.scale if guidance.image_scale is None else guidance.image_scale)
        rollout.code_sampler.temperature.fill_(temperature)
        rollout.code_sampler.top_p.fill_(top_p)
