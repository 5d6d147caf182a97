"""How positions enter the transformer: text ids through a table, image positions through their two codes.

Shape suffixes: T positions, V image positions among them, D code depth, C code width, H hidden width.
"""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megadual.data.dataset import MicroBatch


class Codebooks(torch.nn.Module):
    """The frozen code vectors of both streams, as buffers kept in fp32 whatever the model's precision."""

    def __init__(self, semantic_KC: torch.Tensor, pixel_KC: torch.Tensor):
        super().__init__()
        device = torch.cuda.current_device()
        self.register_buffer("semantic", semantic_KC.float().to(device))
        self.register_buffer("pixel", pixel_KC.float().to(device))


class DualEmbedding(MegatronModule):
    """Word embeddings (vocabulary-parallel) and the visual projector, of the first pipeline stage.

    An image position's embedding is MLP(concat(sum of its semantic code vectors, sum of its pixel code
    vectors)): both codes enter one position (paper, unified input).
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, codebooks: Codebooks, tp_group):
        super().__init__(config=config)
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            vocab_size, config.hidden_size, init_method=config.init_method, config=config, tp_group=tp_group
        )
        self.codebooks = codebooks
        width = codebooks.semantic.size(1) + codebooks.pixel.size(1)
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(width, config.hidden_size),
            torch.nn.GELU(),
            torch.nn.Linear(config.hidden_size, config.hidden_size),
        ).to(device=torch.cuda.current_device(), dtype=config.params_dtype)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """(T, 1, H), or this tensor-parallel rank's share of T under sequence parallelism."""
        embedded_TH = self.word_embeddings(batch.tokens.unsqueeze(0)).squeeze(0)
        summed = [
            F.embedding(codes[batch.image_positions], table).sum(1)
            for codes, table in ((batch.semantic, self.codebooks.semantic), (batch.pixel, self.codebooks.pixel))
        ]
        visual_VH = self.projector(torch.cat(summed, dim=-1).to(embedded_TH.dtype))
        embedded_TH = embedded_TH.index_copy(0, batch.image_positions, visual_VH)
        hidden = embedded_TH.unsqueeze(1)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return hidden
