"""How positions enter the transformer: text ids through a table, image positions through the codes of all streams.

Shape suffixes: T positions, V image positions among them, H hidden width; of a stream D code depth, K codes, C their
width.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megadual.data.dataset import MicroBatch
from megadual.model.main_grad import Linear, lookup
from megadual.streams import Stream


class Codebooks(torch.nn.Module):
    """The frozen code vectors of each stream, as buffers kept in fp32 whatever the model's precision."""

    def __init__(self, codebooks: Mapping[str, torch.Tensor]):
        super().__init__()
        for stream, codebook_KC in codebooks.items():
            self.register_buffer(stream, codebook_KC.float().to(torch.cuda.current_device()))

    def __getitem__(self, stream: str) -> torch.Tensor:
        return self.get_buffer(stream)


class DualEmbedding(MegatronModule):
    """Word embeddings (vocabulary-parallel) and the visual projector, of the first pipeline stage.

    An image position's embedding is MLP(concat(sum of its code vectors, for each stream)): all streams enter one
    position (paper, unified input).
    """

    def __init__(
        self, config: TransformerConfig, vocab_size: int, streams: list[Stream], codebooks: Codebooks, tp_group
    ):
        super().__init__(config=config)
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            vocab_size, config.hidden_size, init_method=config.init_method, config=config, tp_group=tp_group
        )
        self.streams, self.codebooks = streams, codebooks
        self.projector = torch.nn.Sequential(
            Linear(sum(stream.code_dim for stream in streams), config.hidden_size),
            torch.nn.GELU(),
            Linear(config.hidden_size, config.hidden_size),
        ).to(device=torch.cuda.current_device(), dtype=config.params_dtype)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """(T, 1, H), or this tensor-parallel rank's share of T under sequence parallelism."""
        embedded_TH = self._words(batch)
        summed_VC = [
            F.embedding(batch.codes[stream.name][batch.image_at], self.codebooks[stream.name]).sum(1)
            for stream in self.streams
        ]
        visual_VH = self.projector(torch.cat(summed_VC, dim=-1).to(embedded_TH.dtype))
        embedded_TH = embedded_TH.index_copy(0, batch.image_at, visual_VH)
        hidden = embedded_TH.unsqueeze(1)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return hidden

    def _words(self, batch: MicroBatch) -> torch.Tensor:
        """(T, H) rows of the table at text positions; what is at image positions is to be replaced."""
        words = self.word_embeddings
        text_T = torch.ones_like(batch.tokens, dtype=torch.bool).index_fill_(0, batch.image_at, False)
        if words.tp_group.size() == 1:
            return lookup(words.weight, batch.tokens, text_T)
        own_T = (batch.tokens >= words.vocab_start_index) & (batch.tokens < words.vocab_end_index)
        places_T = torch.where(own_T, batch.tokens - words.vocab_start_index, 0)
        found_TH = lookup(words.weight, places_T, own_T & text_T)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(
            found_TH.masked_fill(~own_T[:, None], 0.0), group=words.tp_group
        )
