"""The unified LLM: text and image positions of several streams of codes in, predictions of text and of each stream out.

Shape suffixes: T positions of a micro-batch, P those that predict something, H hidden width; of a stream D code depth,
K codes, C their width.
"""

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.utils.checkpoint import checkpoint

from megadual.data.dataset import MicroBatch
from megadual.model.attention import PackedDocuments, rotary_angles
from megadual.model.config import HeadConfig
from megadual.model.depth_head import DepthHead
from megadual.model.embeddings import Codebooks, DualEmbedding
from megadual.model.fused import linear_cross_entropy
from megadual.model.layers import block_spec, transformer_config
from megadual.streams import Stream
from megadual.train.config import PretrainConfig

VOCAB_MULTIPLE = 128  # the text table is padded to this, whatever the layout, so that layouts agree


@dataclass
class Vocabulary:
    """What the text tokenizer and the DualToken give the model: its streams are those that it reads and writes."""

    text_size: int
    streams: list[Stream]
    codebooks: dict[str, torch.Tensor]  # stream -> (K, C), frozen

    @property
    def padded_text_size(self) -> int:
        return -(-self.text_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass
class StreamLosses:
    """Summed cross-entropies of a micro-batch, fp32: text (), visual of each stream (D,).

    Under context parallelism they are this rank's part of the sum; under sequence parallelism the visual ones are
    this tensor-parallel rank's.
    """

    text: torch.Tensor
    visual: dict[str, torch.Tensor]


class DualLM(LanguageModule):
    """One pipeline chunk of the model. Stages before the last return hidden states, the last StreamLosses."""

    def __init__(
        self,
        run: PretrainConfig,
        vocabulary: Vocabulary,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(transformer_config(run), pg_collection)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = run.model.tie_embeddings
        self.rope_base = run.model.rope_base
        self.drawn_at_once = run.train.drawn_at_once
        config = self.config
        if pre_process or post_process:
            codebooks = Codebooks({stream.name: vocabulary.codebooks[stream.name] for stream in vocabulary.streams})
        if pre_process:
            self.embedding = DualEmbedding(
                config, vocabulary.padded_text_size, vocabulary.streams, codebooks, self.tp_group
            )
        self.decoder = TransformerBlock(
            config,
            block_spec(config, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                vocabulary.padded_text_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process and run.model.tie_embeddings,
                tp_group=self.tp_group,
            )
            self.head_codebooks = codebooks
            self.heads = torch.nn.ModuleDict(
                {stream.name: self._head(run.model.head, stream) for stream in vocabulary.streams}
            )
            for parameter in self.heads.parameters():
                # Each tensor-parallel rank runs the heads on its own positions, so gradients are summed.
                parameter.sequence_parallel = config.sequence_parallel
        self.setup_embeddings_and_output_layer()
        if run.model.tie_embeddings:  # both uses add to its main_grad; megatron-core would add zeros besides
            self.shared_embedding_or_output_weight().zero_out_wgrad = False

    def _head(self, head: HeadConfig, stream: Stream) -> DepthHead:
        with torch.device(torch.cuda.current_device()):  # where making it takes no time
            made = DepthHead(
                self.config.hidden_size,
                head.width,
                head.layers,
                head.heads,
                head.ffn,
                stream.depth,
                stream.codebook_size,
                stream.code_dim,
            )
        return made.to(dtype=self.config.params_dtype)

    def set_input_tensor(self, input_tensor) -> None:
        """Take the hidden states of the stage before (called by megatron-core's schedules)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def hidden_states(self, batch: MicroBatch) -> torch.Tensor:
        """(T, 1, H) after this chunk's layers, or this tensor-parallel rank's share of T under sequence parallelism."""
        return self.decoder(
            hidden_states=self.embedding(batch) if self.pre_process else None,
            attention_mask=None,
            packed_seq_params=PackedDocuments(
                angles=rotary_angles(batch.positions, self.config.kv_channels, self.rope_base),
                cu_seqlens_q=batch.cu_seqlens,
                cu_seqlens_kv=batch.cu_seqlens if batch.key_seqlens is None else batch.key_seqlens,
                max_seqlen_q=batch.longest,
                max_seqlen_kv=batch.longest,
                keys_at=batch.keys_at,
            ),
        )

    def forward(self, batch: MicroBatch) -> torch.Tensor | StreamLosses:
        hidden = self.hidden_states(batch)
        if not self.post_process:
            return hidden
        # All positions on every tensor-parallel rank; the ranks' parts of their gradient are summed in backward.
        if self.config.sequence_parallel:
            hidden = parts = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        else:
            parts = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        text = self._text_loss(parts, batch)
        if self.pg_collection.cp.size() > 1:  # megadual/model/context.py
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.pg_collection.cp)
        return StreamLosses(text, self._visual_losses(hidden, batch))

    def output_weight(self) -> torch.Tensor:
        """This rank's share of the text output layer, which is the embedding's where they are tied."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _text_loss(self, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        at = batch.predicts_text_at
        hidden_PH = hidden.squeeze(1).index_select(0, at)  # whose gradient is cheaper than indexing's
        return linear_cross_entropy(
            hidden_PH[None], self.output_weight(), batch.text_targets[at][None], group=self.tp_group
        )[0]

    def _drawn(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(P,) where the next position is drawn, and its codes, (P, D) each.

        Under sequence parallelism as many on each tensor-parallel rank, wherever in the sequence they lie.
        """
        at, targets = batch.predicts_codes_at, batch.draw_targets
        if self.config.sequence_parallel:
            ranks, rank = self.tp_group.size(), self.tp_group.rank()
            own = slice(len(at) * rank // ranks, len(at) * (rank + 1) // ranks)
            at, targets = at[own], {stream: codes_PD[own] for stream, codes_PD in targets.items()}
        return at, targets

    def _visual_losses(self, hidden: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
        at, targets = self._drawn(batch)
        some = len(at) > 0
        if not some:
            # Every rank has to run every module, forward and backward, and CUDA's attention refuses an empty batch.
            at = at.new_zeros(1)
            targets = {stream: codes_PD.new_zeros(1, codes_PD.size(1)) for stream, codes_PD in targets.items()}
        hidden_PH = hidden.squeeze(1).index_select(0, at)
        return {
            stream: head_losses(head, hidden_PH, targets[stream], self.head_codebooks[stream], self.drawn_at_once)
            * float(some)
            for stream, head in self.heads.items()
        }


def head_losses(
    head: DepthHead, hidden_PH: torch.Tensor, codes_PD: torch.Tensor, codebook_KC: torch.Tensor, at_once: int | None
) -> torch.Tensor:
    """(D,) what `head` returns; activations of `at_once` positions are kept for backward, others are made again there.

    Those that are kept come last: backward begins with them, and then has their memory for the others.
    """
    P = len(codes_PD)
    if at_once is None or P <= at_once or not torch.is_grad_enabled():
        return head(hidden_PH, codes_PD, codebook_KC)
    again = P - at_once
    sizes = [*(min(at_once, again - start) for start in range(0, again, at_once)), at_once]
    *parts, kept = zip(hidden_PH.split(sizes), codes_PD.split(sizes), strict=True)
    losses_D = [checkpoint(head, *part, codebook_KC, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return sum(losses_D, head(*kept, codebook_KC))
