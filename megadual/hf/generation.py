"""What an exported model is for: describing images, drawing them, and answering in text and images.

Shape suffixes: R rows (B images, then the same without captions where guided), S positions of a prompt, N positions
of an image, D a stream's code depth, T streams, K a stream's codebook size.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from megadual.hf.decoding import whole_slots
from megadual.hf.processing_megadual import IM_END, MegaDualProcessor
from megadual.hf.rollout import Rollout
from megadual.streams import IMAGE
from megadual.vision.tokenizer import to_image

BATCH = 32  # images drawn at once; more are drawn in turn
POSITIONS_AHEAD = 8  # where progress is shown, the host waits for the GPU every so many positions


class Generation:
    """`describe`, `draw` and `interleave` of MegaDualForCausalLM. All need the model on one device."""

    _kept: tuple[object, Rollout | None] = (None, None)  # the last rollout, whose captured graphs are worth keeping

    @cached_property
    def tokenizer(self):
        """The text tokenizer of the folder that the model came from."""
        return PreTrainedTokenizerFast.from_pretrained(self.config._name_or_path)

    @cached_property
    def processor(self) -> MegaDualProcessor:
        """Makes `input_ids` and `pixel_values` of texts, images and messages."""
        (rows, columns), size = self.dualtoken.config.grid, self.dualtoken.config.image_size
        return MegaDualProcessor(self.tokenizer, image_size=size, image_positions=rows * columns)

    @torch.no_grad()
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
        """A text for each image, going on from `prompt`. At temperature 0 the likeliest token is taken."""
        inputs = self.processor(text=[IMAGE + prompt] * len(images), images=images).to(self.device)
        slots = inputs["input_ids"].size(1) + max_new_tokens
        rollout = self._rollout(len(images), 1, slots, text_top_k=top_k if temperature else 1, draws=False)
        self._set_text(rollout, temperature, top_p, seed)
        rollout.start(self.embed(inputs["input_ids"], inputs["pixel_values"]), inputs["attention_mask"].bool())
        stops, texts = self._stops, [[] for _ in images]
        rollout.bias_V[list(stops)] = -torch.inf
        unfinished = set(range(len(images)))
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
        self._check_draws()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        captions = [self._ids(text) for text in prompts for _ in range(n)]
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        images = []
        for start in range(0, len(captions), BATCH):
            batch = captions[start : start + BATCH]
            codes = self.draw_codes(batch, cfg_scale, temperature, top_k, top_p, seed + start, progress=progress)
            images += self._images(codes)
        return images

    @torch.no_grad()
    def draw_codes(
        self,
        captions: list[list[int]],
        cfg_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int = 0,
        choose: Callable[[int, str, int, Tensor], Tensor] | None = None,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """Codes (B, N, D) of an image for each caption (token ids), by stream.

        With `cfg_scale` s != 1 the logits are u + s (c - u) at every depth, u those of the same image without its
        caption. `choose(position, stream, d, logits (B, K))`, where given, chooses the codes (B,) of a depth.
        """
        special, branches = self.config.special, 2 if cfg_scale != 1 else 1
        prompts = [[*caption, special.image_gen_start] for caption in captions]
        prompts += [[special.image_gen_start]] * (len(captions) * (branches - 1))
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids_RS = torch.tensor(
            [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)], device=self.device
        )
        kept_RS = torch.arange(longest, device=self.device) >= torch.tensor(padding, device=self.device)[:, None]
        rows, columns = self.dualtoken.config.grid
        slots = longest + rows * columns
        rollout = self._rollout(len(captions), branches, slots, code_top_k=top_k, writes=False, choose=choose)
        self._set_codes(rollout, cfg_scale, temperature, top_p, seed)
        rollout.start(self.model.embed_tokens(ids_RS), kept_RS)
        return self._draw_positions(rollout, progress)

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
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int | None = None,
        progress: bool = False,
    ) -> list[str | Image.Image]:
        """An answer of texts and images in the order written; an image begins where the model says so.

        `prompt` is a text with `<image>` for each of `images`, or chat messages (see the processor's
        `apply_chat_template`). Guidance is towards all that stands before an image, from nothing before it.
        At most `max_images` images: by default 4 of a model that draws, none of one that does not.
        """
        if max_images is None:
            max_images = 4 if self.draws else 0
        if max_images:
            self._check_draws()
        inputs = self.processor.prompt(prompt, images).to(self.device)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        special, (rows, columns) = self.config.special, self.dualtoken.config.grid
        branches = 2 if cfg_scale != 1 else 1
        slots = inputs["input_ids"].size(1) + max_new_tokens + max_images * (rows * columns + 2)
        text_top_k = text_top_k if text_temperature else 1
        rollout = self._rollout(1, branches, slots, text_top_k=text_top_k, code_top_k=top_k, draws=max_images > 0)
        self._set_text(rollout, text_temperature, text_top_p, seed)
        rollout.bias_V[special.image_gen_start] = 0.0 if max_images else -torch.inf
        embeds_BSH = self.embed(inputs["input_ids"], inputs.get("pixel_values"))
        rollout.start(embeds_BSH.expand(branches, -1, -1), inputs["attention_mask"].bool().expand(branches, -1))

        answer, text, drawn = [], [], 0
        for _ in range(max_new_tokens):
            rollout.write()
            token = int(rollout.tokens_B)
            if token in self._stops:
                break
            if token != special.image_gen_start:
                text.append(token)
                continue
            answer += [self.tokenizer.decode(text, skip_special_tokens=True)] if text else []
            self._set_codes(rollout, cfg_scale, temperature, top_p, seed + drawn)
            rollout.llm.forget(slice(1, None))
            answer += self._images(self._draw_positions(rollout, progress))
            rollout.write()  # the last position is read as well
            rollout.feed(special.image_gen_end)
            text, drawn = [], drawn + 1
            if drawn == max_images:
                rollout.bias_V[special.image_gen_start] = -torch.inf
        return answer + ([self.tokenizer.decode(text, skip_special_tokens=True)] if text else [])

    def _draw_positions(self, rollout: Rollout, progress: bool) -> dict[str, Tensor]:
        rollout.position.zero_()
        positions = len(rollout.code_uniform_NDTB)
        for position in tqdm(range(positions), unit="position", disable=not progress, mininterval=0.5):
            rollout.draw()
            if progress and self.device.type == "cuda" and position % POSITIONS_AHEAD == 0:
                torch.cuda.synchronize()
        return {stream: codes_NBD.transpose(0, 1).clone() for stream, codes_NBD in rollout.codes_NBD.items()}

    def _images(self, codes_BND: dict[str, Tensor]) -> list[Image.Image]:
        grid = self.dualtoken.config.grid
        codes = {stream: codes.unflatten(1, grid) for stream, codes in codes_BND.items()}
        return [to_image(image) for image in self.dualtoken.decode(codes)]

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
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @property
    def _stops(self) -> set[int]:
        """Tokens that end a text."""
        configured = self.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        ends = {self.config.special.end_of_text, self.tokenizer.get_vocab().get(IM_END), *configured}
        return ends - {None}

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
        rollout.bias_V[list(set(vars(special).values()) - {special.end_of_text})] = -torch.inf
        rollout.text_sampler.temperature.fill_(temperature or 1.0)
        rollout.text_sampler.top_p.fill_(top_p)
        if temperature:
            seed = int(torch.randint(2**31, ())) if seed is None else seed
            length, texts = rollout.text_uniform_LB.shape
            numbers = [torch.rand(length, generator=torch.Generator().manual_seed(seed + i)) for i in range(texts)]
            rollout.text_uniform_LB.copy_(torch.stack(numbers, dim=1))

    def _set_codes(self, rollout: Rollout, scale: float, temperature: float, top_p: float, seed: int) -> None:
        positions, depth, streams, images = rollout.code_uniform_NDTB.shape
        numbers = [
            torch.rand(positions, streams, depth, generator=torch.Generator().manual_seed(seed + i))
            for i in range(images)
        ]
        rollout.code_uniform_NDTB.copy_(torch.stack(numbers).permute(1, 3, 2, 0))
        rollout.scale.fill_(scale)
        rollout.code_sampler.temperature.fill_(temperature)
        rollout.code_sampler.top_p.fill_(top_p)
