"""The exported MegaDual model: describes images and draws them, from one folder.

Shape suffixes: B sequences, S positions, V image positions of all sequences in order, N positions of one image,
D code depth, K codebook size, H hidden width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, Qwen2Model
from transformers.modeling_outputs import CausalLMOutputWithPast

from megadual.hf.configuration_megadual import MegaDualConfig
from megadual.hf.generation import Generation
from megadual.model.depth_head import DepthHead
from megadual.streams import STREAMS
from megadual.vision.quantizer import Codebook
from megadual.vision.tokenizer import DualToken


@dataclass
class MegaDualOutput(CausalLMOutputWithPast):
    """With logits (B, S, vocabulary) semantic_logits and pixel_logits (P, D, K) for the P positions of all sequences
    whose next one is drawn, in order."""

    semantic_logits: Tensor | None = None
    pixel_logits: Tensor | None = None


# What transformers calls the keys and values of the positions before: the second name since 5.24.
CACHE = next(name for name in ("cache", "past_key_values") if name in MegaDualOutput.__dataclass_fields__)


class MegaDualForCausalLM(Generation, PreTrainedModel, GenerationMixin):
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
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        semantic_codes: Tensor | None = None,
        pixel_codes: Tensor | None = None,
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
            **kwargs,  # the cache is among them, under the name that transformers has for it
        )
        hidden_BSH = outputs.last_hidden_state
        visual = {}
        if semantic_codes is not None:
            visual = self._drawn_logits(hidden_BSH, input_ids, {"semantic": semantic_codes, "pixel": pixel_codes})
        return MegaDualOutput(
            logits=self.lm_head(hidden_BSH[:, -logits_to_keep:]),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
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
