"""The exported MegaDual model: describes images and draws them, from one folder.

Shape suffixes: B sequences, S positions, V image positions of all sequences in order, N positions of one image,
D code depth, K codebook size, H hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Model
from transformers.utils import ModelOutput

from megadual.hf.configuration_megadual import MegaDualConfig
from megadual.model.depth_head import DepthHead
from megadual.streams import STREAMS
from megadual.vision.quantizer import Codebook
from megadual.vision.tokenizer import DualToken, to_image


@dataclass
class MegaDualOutput(ModelOutput):
    """logits (B, S, vocabulary); semantic_logits and pixel_logits (P, D, K) for the P positions of all sequences
    whose next one is drawn, in order."""

    logits: Tensor | None = None
    semantic_logits: Tensor | None = None
    pixel_logits: Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def sample(logits_BK: Tensor, uniform_B: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(B,) codes from the `top_k` likeliest and of those the fewest that hold `top_p`, by inverse CDF of `uniform_B`.

    Randomness comes in as numbers in [0, 1), so that an image does not depend on its batch or device.
    """
    values, codes = logits_BK.topk(min(top_k, logits_BK.size(-1)))
    probabilities = F.softmax(values / temperature, dim=-1)
    before = probabilities.cumsum(-1) - probabilities
    cumulative = probabilities.masked_fill(before >= top_p, 0.0).cumsum(-1)
    rank = (cumulative < uniform_B[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return codes.gather(-1, rank).squeeze(-1)


class MegaDualForCausalLM(PreTrainedModel, GenerationMixin):
    """Qwen2 decoder, visual projector, two depth heads and the DualToken whose codes they read and write."""

    config_class = MegaDualConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict = ["dualtoken"]  # in bf16 the nearest code would be another one
    _no_split_modules = ["Qwen2DecoderLayer", "DepthHead", "DualToken"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True

    def __init__(self, config: MegaDualConfig):
        super().__init__(config)
        text, head = config.text_config, config.head
        self.model = Qwen2Model(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        dualtoken = config.dualtoken_config()
        self.projector = nn.Sequential(
            nn.Linear(2 * dualtoken.code_dim, text.hidden_size),
            nn.GELU(),
            nn.Linear(text.hidden_size, text.hidden_size),
        )
        for stream in STREAMS:
            self.add_module(
                f"{stream}_head",
                DepthHead(
                    text.hidden_size,
                    head["width"],
                    head["layers"],
                    head["heads"],
                    head["ffn"],
                    dualtoken.depth,
                    dualtoken.codebook_size,
                    dualtoken.code_dim,
                ),
            )
        self.dualtoken = DualToken(dualtoken)
        for stream in STREAMS:  # one codebook under D names would be D shared tensors to save
            quantizer = self.dualtoken.quantizer(stream)
            quantizer.codebooks = quantizer.codebooks[:1]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Codebook):
            module.restarted.zero_()  # not in the file, and made on the meta device when loading

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @cached_property
    def tokenizer(self):
        """The text tokenizer of the folder that the model came from."""
        return PreTrainedTokenizerFast.from_pretrained(self.config._name_or_path)

    def embed_codes(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        """Both codes (..., D) of positions -> their embeddings (..., H)."""
        summed = [self.dualtoken.embed(semantic, "semantic"), self.dualtoken.embed(pixel, "pixel")]
        return self.projector(torch.cat(summed, dim=-1).to(self.projector[0].weight.dtype))

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        semantic_codes: Tensor | None = None,
        pixel_codes: Tensor | None = None,
    ) -> Tensor:
        """(B, S) ids -> (B, S, H), the V `<image>` positions filled from images (I, 3, h, w) or codes (..., D)."""
        embeds_BSH = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            encoded = self.dualtoken.encode(pixel_values.to(embeds_BSH.device, torch.float32))
            semantic_codes, pixel_codes = encoded.semantic, encoded.pixel
        at_BS = input_ids == self.config.special.image
        given = 0 if semantic_codes is None else semantic_codes[..., 0].numel()
        if at_BS.sum() != given:
            raise ValueError(f"input_ids hold {int(at_BS.sum())} <image> positions, codes for {given} are given")
        if given:
            visual_VH = self.embed_codes(semantic_codes.flatten(0, -2), pixel_codes.flatten(0, -2))
            embeds_BSH = embeds_BSH.masked_scatter(at_BS[..., None], visual_VH)
        return embeds_BSH

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        semantic_codes: Tensor | None = None,
        pixel_codes: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> MegaDualOutput:
        """Text logits, and visual logits (teacher-forced) where `input_ids` hold images to be drawn.

        Images come as `pixel_values` (I, 3, h, w), or as `semantic_codes` and `pixel_codes` (..., D) for all
        `<image>` positions in order. `logits_to_keep` last positions get text logits; 0: all.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values, semantic_codes, pixel_codes)
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_BSH = outputs.last_hidden_state
        visual = {}
        if semantic_codes is not None:
            visual = self._drawn_logits(hidden_BSH, input_ids, {"semantic": semantic_codes, "pixel": pixel_codes})
        return MegaDualOutput(
            logits=self.lm_head(hidden_BSH[:, -logits_to_keep:]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **visual,
        )

    def _drawn_logits(self, hidden_BSH: Tensor, input_ids: Tensor, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        special = self.config.special
        inside = (input_ids == special.image_gen_start).cumsum(1) > (input_ids == special.image_gen_end).cumsum(1)
        image_BS = input_ids == special.image
        drawn_BS = image_BS & inside
        before_BS = F.pad(drawn_BS[:, 1:], (0, 1))
        logits = {}
        for stream in STREAMS:
            codes_PD = codes[stream].flatten(0, -2)[drawn_BS[image_BS]]
            head = getattr(self, f"{stream}_head")
            logits[f"{stream}_logits"] = head.logits(
                hidden_BSH[before_BS], codes_PD[:, :-1], self.dualtoken.codebook(stream)
            )
        return logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        semantic_codes: Tensor | None = None,
        pixel_codes: Tensor | None = None,
        **kwargs,
    ):
        """Text after a prompt that may hold images (see `forward`); the rest is GenerationMixin.generate."""
        embeds = self.embed(input_ids, pixel_values, semantic_codes, pixel_codes)
        return super().generate(input_ids=input_ids, inputs_embeds=embeds, **kwargs)

    @torch.no_grad()
    def describe(self, images: list[Image.Image], prompt: str = "", max_new_tokens: int = 64, **kwargs) -> list[str]:
        """A text for each image, going on from `prompt`. Greedy unless `kwargs` for `generate` say otherwise."""
        special, (rows, columns) = self.config.special, self.dualtoken.config.grid
        image = [special.image_start] + [special.image] * (rows * columns) + [special.image_end]
        ids = image + self.tokenizer(prompt, add_special_tokens=False).input_ids
        input_ids = torch.tensor([ids] * len(images), device=self.device)
        texts = self.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=torch.stack([self.dualtoken.preprocess(image) for image in images]),
            max_new_tokens=max_new_tokens,
            **kwargs,
        )
        return self.tokenizer.batch_decode(texts[:, len(ids) :], skip_special_tokens=True)

    @torch.no_grad()
    def draw(
        self,
        prompts: list[str],
        cfg_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int | None = None,
    ) -> list[Image.Image]:
        """An image for each prompt. Image i comes from `seed` + i and its prompt alone, whatever else is drawn."""
        captions = self.tokenizer(list(prompts), add_special_tokens=False).input_ids
        (rows, columns), depth = self.dualtoken.config.grid, self.dualtoken.config.depth
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        uniform = torch.stack(
            [
                torch.rand(rows * columns, len(STREAMS), depth, generator=torch.Generator().manual_seed(seed + i))
                for i in range(len(captions))
            ]
        ).to(self.device)

        def choose(position: int, stream: str, d: int, logits_BK: Tensor) -> Tensor:
            numbers_B = uniform[:, position, STREAMS.index(stream), d]
            return sample(logits_BK, numbers_B, temperature, top_k, top_p)

        codes = self.draw_codes(captions, cfg_scale, choose)
        images = self.dualtoken.decode(codes["pixel"].unflatten(1, (rows, columns)))
        return [to_image(image) for image in images]

    @torch.no_grad()
    def draw_codes(
        self, captions: list[list[int]], cfg_scale: float, choose: Callable[[int, str, int, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Codes (B, N, D) of both streams of an image for each caption (token ids).

        `choose(position, stream, d, logits (B, K))` gives the codes (B,) of depth d. With `cfg_scale` s != 1 the
        logits are u + s (c - u) at every depth, u those of the same image without its caption.
        """
        images, guided = len(captions), cfg_scale != 1
        branches = 2 if guided else 1
        prompts = [[*caption, self.config.special.image_gen_start] for caption in captions]
        prompts += [[self.config.special.image_gen_start]] * (images if guided else 0)
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        kept = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        attention_mask = torch.tensor(kept, device=self.device)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        embeds, cache = self.model.embed_tokens(torch.tensor(padded, device=self.device)), None
        rows, columns = self.dualtoken.config.grid
        drawn = {stream: [] for stream in STREAMS}
        for position in range(rows * columns):
            outputs = self.model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            cache, hidden = outputs.past_key_values, outputs.last_hidden_state[:, -1]
            for stream in STREAMS:
                drawn[stream].append(self._draw_position(stream, hidden, position, cfg_scale, choose))
            latest = [drawn[stream][-1].repeat(branches, 1) for stream in STREAMS]
            embeds = self.embed_codes(*latest)[:, None]
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
            position_ids = position_ids[:, -1:] + 1
        return {stream: torch.stack(codes, dim=1) for stream, codes in drawn.items()}

    def _draw_position(self, stream: str, hidden: Tensor, position: int, cfg_scale: float, choose) -> Tensor:
        """(B, D) codes of one stream at one position; `hidden` holds the branch with and the one without captions."""
        head, codebook = getattr(self, f"{stream}_head"), self.dualtoken.codebook(stream)
        branches = 2 if cfg_scale != 1 else 1
        codes_BD = torch.empty(len(hidden) // branches, 0, dtype=torch.int64, device=hidden.device)
        for d in range(self.dualtoken.config.depth):
            state = head.states(hidden, codes_BD.repeat(branches, 1), codebook)[:, -1]
            logits = F.linear(state, head.classifiers[d]).float()
            if branches == 2:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + cfg_scale * (conditional - unconditional)
            codes_BD = torch.cat([codes_BD, choose(position, stream, d, logits)[:, None]], dim=1)
        return codes_BD
