"""The unified model as it is usually put together: Hugging Face's Qwen2 and plain depth heads. A baseline for timing.

Every position goes through the output layer, logits are whole, and positions of one row are one document.
Shape suffixes: T positions, P positions that are drawn, D code depth, K codebook size, C code width, H hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from megadual.data.dataset import MicroBatch
from megadual.data.layout import IGNORE
from megadual.model.config import ModelConfig
from megadual.model.dual_lm import Vocabulary
from megadual.streams import Stream


class PlainDepthHead(nn.Module):
    """A small Qwen2 over the depths of a position."""

    def __init__(self, hidden: int, head, stream: Stream):
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(hidden, head.width), nn.GELU(), nn.Linear(head.width, head.width))
        self.code_projector = nn.Linear(stream.code_dim, head.width)
        self.transformer = Qwen2Model(
            Qwen2Config(
                vocab_size=1,
                hidden_size=head.width,
                intermediate_size=head.ffn,
                num_hidden_layers=head.layers,
                num_attention_heads=head.heads,
                num_key_value_heads=head.heads,
                attn_implementation="sdpa",
            )
        )
        self.classifiers = nn.ModuleList(
            nn.Linear(head.width, stream.codebook_size, bias=False) for _ in range(stream.depth)
        )

    def forward(self, hidden_PH: Tensor, codes_PD: Tensor, codebook_KC: Tensor) -> Tensor:
        """Mean cross-entropy over positions and depths."""
        start = self.projector(hidden_PH)[:, None]
        before = F.embedding(codes_PD[:, :-1], codebook_KC).cumsum(1).to(start.dtype)
        inputs = torch.cat([start, self.code_projector(before)], dim=1)
        states = self.transformer(inputs_embeds=inputs, use_cache=False).last_hidden_state
        losses = [
            F.cross_entropy(classify(states[:, d]).float(), codes_PD[:, d])
            for d, classify in enumerate(self.classifiers)
        ]
        return torch.stack(losses).mean()


class PlainUnified(nn.Module):
    """Qwen2ForCausalLM, a visual projector and depth heads; `forward` is the loss of one row of one document."""

    def __init__(self, model: ModelConfig, vocabulary: Vocabulary):
        super().__init__()
        self.lm = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocabulary.padded_text_size,
                hidden_size=model.hidden,
                intermediate_size=model.ffn,
                num_hidden_layers=model.layers,
                num_attention_heads=model.heads,
                num_key_value_heads=model.kv_heads,
                attn_implementation="sdpa",
            )
        )
        self.heads = nn.ModuleDict()
        for stream in vocabulary.streams:
            self.register_buffer(f"{stream.name}_codebook", vocabulary.codebooks[stream.name])
            self.heads[stream.name] = PlainDepthHead(model.hidden, model.head, stream)
        width = sum(stream.code_dim for stream in vocabulary.streams)
        self.projector = nn.Sequential(nn.Linear(width, model.hidden), nn.GELU(), nn.Linear(model.hidden, model.hidden))

    def forward(self, batch: MicroBatch) -> Tensor:
        embedded_TH = self.lm.model.embed_tokens(batch.tokens)
        codebooks = {stream: self.get_buffer(f"{stream}_codebook") for stream in self.heads}
        summed = [
            F.embedding(batch.codes[stream][batch.image_at], codebook).sum(1) for stream, codebook in codebooks.items()
        ]
        visual = self.projector(torch.cat(summed, dim=-1).to(embedded_TH.dtype))
        embedded_TH = embedded_TH.index_copy(0, batch.image_at, visual.to(embedded_TH.dtype))
        hidden_TH = self.lm.model(inputs_embeds=embedded_TH[None], use_cache=False).last_hidden_state[0]
        logits = self.lm.lm_head(hidden_TH).float()
        loss = F.cross_entropy(logits, batch.text_targets, ignore_index=IGNORE)
        drawn_PH = hidden_TH[batch.predicts_codes_at]
        for stream, head in self.heads.items():
            loss = loss + head(drawn_PH, batch.draw_targets[stream], codebooks[stream])
        return loss
