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
from megadual.vision.quantizer import Codebook
from megadual.vision.tokenizer import DualToken


@dataclass
class MegaDualOutput(CausalLMOutputWithPast):
    """With logits (B, S, vocabulary), and `visual_logits` by stream, (P, D, K) for the P positions of all sequences
    whose next one is drawn, in order."""

    visual_logits: dict[str, Tensor] | None = None


# What transformers calls the keys and values of the positions before: the second name since 5.24.
CACHE = next(name for name in ("cache", "past_key_values") if name in MegaDualOutput.__dataclass_fields__)


class MegaDualForCausalLM(Generation, PreTrainedModel, GenerationMixin):
    """Qwen2 decoder, visual projector, a depth head a stream and the DualToken whose codes they read and write."""

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
        self.streams = {stream.name: stream for stream in config.code_streams}
        self.projector = nn.Sequential(
            nn.Linear(sum(stream.code_dim for stream in self.streams.values()), text.hidden_size),
            nn.GELU(),
            nn.Linear(text.hidden_size, text.hidden_size),
        )
        self.heads = nn.ModuleDict(
            {
                name: DepthHead(
                    text.hidden_size,
                    head["width"],
                    head["layers"],
                    head["heads"],
                    head["ffn"],
                    stream.depth,
                    stream.codebook_size,
                    stream.code_dim,
                )
                for name, stream in self.streams.items()
            }
        )
        self.dualtoken = DualToken(config.dualtoken_config())
        for quantizer in self.dualtoken.quantizers.values():
            if quantizer.shared:  # one codebook under D names would be D shared tensors to save
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

    def embed_codes(self, codes: dict[str, Tensor]) -> Tensor:
        """Codes (..., D) of positions by stream -> their embeddings (..., H)."""
        summed = [self.dualtoken.embed(codes[stream], stream) for stream in self.streams]
        return self.projector(torch.cat(summed, dim=-1).to(self.projector[0].weight.dtype))

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, codes: dict[str, Tensor] | None = None
    ) -> Tensor:
        """(B, S) ids -> (B, S, H), the V `<image>` positions filled from images (I, 3, h, w) or codes (..., D)."""
        embeds_BSH = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            codes = self.dualtoken.encode(pixel_values.to(embeds_BSH.device, torch.float32), pooled=False).codes
        at_BS = input_ids == self.config.special.image
        given = {stream: codes[stream][..., 0].numel() if codes else 0 for stream in self.streams}
        for stream, count in given.items():
            if at_BS.sum() != count:
                places = int(at_BS.sum())
                raise ValueError(f"input_ids hold {places} <image> positions, {stream} codes for {count} are given")
        if codes:
            visual_VH = self.embed_codes({stream: codes[stream].flatten(0, -2) for stream in self.streams})
            embeds_BSH = embeds_BSH.masked_scatter(at_BS[..., None], visual_VH)
        return embeds_BSH

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        codes: dict[str, Tensor] | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> MegaDualOutput:
        """Text logits, and visual logits (teacher-forced) where `input_ids` hold images to be drawn.

        Images come as `pixel_values` (I, 3, h, w), or as `codes`: by stream (..., D) for all `<image>` positions in
        order. `logits_to_keep` last positions get text logits; 0: all.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values, codes)
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,  # the cache is among them, under the name that transformers has for it
        )
        hidden_BSH = outputs.last_hidden_state
        return MegaDualOutput(
            logits=self.lm_head(hidden_BSH[:, -logits_to_keep:]),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_logits=self._drawn_logits(hidden_BSH, input_ids, codes) if codes else None,
            **{CACHE: outputs.get(CACHE)},
        )

    def _drawn_logits(self, hidden_BSH: Tensor, input_ids: Tensor, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        special = self.config.special
        inside = (input_ids == special.image_gen_start).cumsum(1) > (input_ids == special.image_gen_end).cumsum(1)
        image_BS = input_ids == special.image
        drawn_BS = image_BS & inside
        hidden_PH = hidden_BSH[F.pad(drawn_BS[:, 1:], (0, 1))]
        logits = {}
        for stream, head in self.heads.items():
            codes_PD = codes[stream].flatten(0, -2)[drawn_BS[image_BS]]
            logits[stream] = head.logits(hidden_PH, codes_PD[:, :-1], self.dualtoken.codebook(stream))
        return logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        codes: dict[str, Tensor] | None = None,
        **kwargs,
    ):
        """Text after a prompt that may hold images (see `forward`); the rest is GenerationMixin.generate."""
        embeds = self.embed(input_ids, pixel_values, codes)
        return super().generate(input_ids=input_ids, inputs_embeds=embeds, **kwargs)
