"""Cross-entropy of the text stream over a vocabulary that is split over tensor-parallel ranks."""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch.utils.checkpoint import checkpoint


def _summed_cross_entropy(hidden_PH, weight_VH, targets_P):
    logits_PV = F.linear(hidden_PH, weight_VH).float()
    return tensor_parallel.vocab_parallel_cross_entropy(logits_PV, targets_P).sum()


def vocab_parallel_text_loss(
    hidden_PH: torch.Tensor, weight_VH: torch.Tensor, targets_P: torch.Tensor, chunk: int = 1024
) -> torch.Tensor:
    """Summed cross-entropy, in fp32, of P positions; `weight_VH` is this rank's share of the output layer.

    Logits live for one chunk of positions at a time and are made again in the backward pass.
    """
    sums = [
        checkpoint(_summed_cross_entropy, hidden, weight_VH, targets, use_reentrant=False)
        for hidden, targets in zip(hidden_PH.split(chunk), targets_P.split(chunk))
    ]
    return torch.stack(sums).sum()
