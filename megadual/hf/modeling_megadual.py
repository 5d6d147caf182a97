"""The exported MegaDual model: describes images and draws them, from one folder.

Shape suffixes: B sequences, S positions, I images, V image positions of all sequences in order, N positions of one
image, P positions whose next one is drawn, D code depth, C the depths of all streams together, K codebook size, H
hidden width.
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
from megadual.streams import TEXT
from megadual.vision.quantizer import Codebook
from megadual.vision.tokenizer import DualToken

IGNORE = -100  # the label of a token without a loss


@dataclass
class MegaDualOutput(CausalLMOutputWithPast):
    """With logits (B, S, vocabulary), and `visual_logits` by stream, (P, D, K) for the P positions of all sequences
    whose next one is drawn, in order. With labels `losses` are the parts of the loss, of the text and by stream."""

    visual_logits: dict[str, Tensor] | None = None
    losses: dict[str, Tensor] | None = None


# What transformers calls the keys and values of the positions before: the second name since 5.24.
CACHE = next(name for name in ("cache", "past_key_values") if name in MegaDualOutput.__dataclass_fields__)


class MegaDualForCausalLM(Generation, PreTrainedModel, GenerationMixin):
    """Qwen2 decoder, visual projector, a depth head a stream and the DualToken whose codes they read and write."""

    config_class = MegaDualConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict = ["dualtoken"]  # in bf16 the nearest code would be another one
    _no_split_modules = ["Qwen2DecoderLayer", "DepthHead", "DualToken"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over its own targets, whatever transformers' Trainer counts
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

    def train(self, mode: bool = True):
        """The DualToken stays as it is: training would move its codebooks."""
        super().train(mode)
        self.dualtoken.eval().requires_grad_(False)
        return self

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

    @torch.no_grad()
    def codes_of(self, pixel_values: Tensor | None = None, image_codes: Tensor | None = None) -> dict | None:
        """The codes (I, N, D) by stream of a processor's images, which come as pixels (.., 3, h, w) or as codes
        (I, N, C), -1 for those that come as pixels; None of no images."""
        seen = {}
        if pixel_values is not None:
            pixels = pixel_values.to(self.device, torch.float32)
            encoded = self.dualtoken.encode(pixels, pooled=False).codes
            seen = {stream: encoded[stream].flatten(1, -2) for stream in self.streams}
        if image_codes is None:
            return seen or None
        image_codes = image_codes.to(self.device)
        depths = [stream.depth for stream in self.streams.values()]
        codes = dict(zip(self.streams, image_codes.split(depths, dim=-1), strict=True))
        as_pixels = image_codes[:, 0, 0] < 0
        for stream, codes_IND in seen.items():
            codes[stream] = codes[stream].clone()
            codes[stream][as_pixels] = codes_IND
        return codes

    def embed(self, input_ids: Tensor, codes: dict[str, Tensor] | None = None) -> Tensor:
        """(B, S) ids -> (B, S, H), the V `<image>` positions filled from codes (..., D) by stream."""
        embeds_BSH = self.model.embed_tokens(input_ids)
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
        image_codes: Tensor | None = None,
        codes: dict[str, Tensor] | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> MegaDualOutput:
        """Text logits, and visual logits (teacher-forced) where `input_ids` hold images to be drawn.

        Images come as the processor gives them (see `codes_of`), or as `codes`: by stream (..., D) for all `<image>`
        positions in order. `logits_to_keep` last positions get text logits; 0: all.

        `labels` (B, S) are `input_ids`, or -100 where a token has no loss; they are shifted in here. The loss is that
        of training with weights of 1: the mean over the texts' tokens, and for each stream the mean over the drawn
        positions that have a label and over its depths, added up. An image that is looked at has none.
        """
        if inputs_embeds is None:
            codes = codes or self.codes_of(pixel_values, image_codes)
            inputs_embeds = self.embed(input_ids, codes)
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,  # the cache is among them, under the name that transformers has for it
        )
        hidden_BSH = outputs.last_hidden_state
        logits = self.lm_head(hidden_BSH[:, -logits_to_keep if labels is None else 0 :])
        losses = self._losses(hidden_BSH, logits, input_ids, codes, labels) if labels is not None else None
        return MegaDualOutput(
            loss=sum(losses.values()) if losses else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_logits=self._drawn_logits(hidden_BSH, input_ids, codes) if codes and labels is None else None,
            losses=losses,
            **{CACHE: outputs.get(CACHE)},
        )

    def _drawn(self, input_ids: Tensor) -> Tensor:
        """(B, S) image positions that the model draws."""
        special = self.config.special
        inside = (input_ids == special.image_gen_start).cumsum(1) > (input_ids == special.image_gen_end).cumsum(1)
        return (input_ids == special.image) & inside

    def _drawn_logits(self, hidden_BSH: Tensor, input_ids: Tensor, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        drawn_BS, image_BS = self._drawn(input_ids), input_ids == self.config.special.image
        hidden_PH = hidden_BSH[F.pad(drawn_BS[:, 1:], (0, 1))]
        logits = {}
        for stream, head in self.heads.items():
            codes_PD = codes[stream].flatten(0, -2)[drawn_BS[image_BS]]
            if len(codes_PD):
                logits[stream] = head.logits(hidden_PH, codes_PD[:, :-1], self.dualtoken.codebook(stream))
            else:  # attention on a GPU refuses an empty batch
                depth, size, _ = head.classifiers.shape
                logits[stream] = hidden_PH.new_zeros(0, depth, size)
        return logits

    def _losses(
        self, hidden_BSH: Tensor, logits: Tensor, input_ids: Tensor, codes: dict[str, Tensor] | None, labels: Tensor
    ) -> dict[str, Tensor]:
        """The mean losses of the text and, where anything is drawn, of each stream."""
        image_BS = input_ids == self.config.special.image
        text = labels.masked_fill(image_BS, IGNORE)[:, 1:]
        summed = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), text.flatten(), reduction="sum")
        losses = {TEXT: summed / (text != IGNORE).sum().clamp(min=1)}
        drawn_BS = self._drawn(input_ids) & (labels != IGNORE)
        if codes and drawn_BS.any():
            hidden_PH = hidden_BSH[F.pad(drawn_BS[:, 1:], (0, 1))]
            for stream, head in self.heads.items():
                codes_PD = codes[stream].flatten(0, -2)[drawn_BS[image_BS]]
                losses[stream] = head(hidden_PH, codes_PD, self.dualtoken.codebook(stream)).sum() / codes_PD.numel()
        return losses

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        codes: dict[str, Tensor] | None = None,
        **kwargs,
    ):
        """Text after a prompt that may hold images (see `forward`); the rest is GenerationMixin.generate."""
        embeds = self.embed(input_ids, codes or self.codes_of(pixel_values, image_codes))
        return super().generate(input_ids=input_ids, inputs_embeds=embeds, **kwargs)
