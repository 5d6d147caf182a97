"""One position at a time, on buffers that never move, so that on a GPU a whole position is one CUDA graph.

Shape suffixes: R rows (images, then the same images without their captions where guided), B images, S positions, P
those of a piece, L cache slots, H the LLM's width, G query heads of one key-value head, A key-value heads, E head
width; D code depth, T streams, K codebook size, W the visual head's width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Model

from megadual.kernels.few_rows import gated, linear
from megadual.model.depth_head import DepthHead

SLOTS = 64
PIECE = 512  # positions of a prompt that are read at once: what they see of it is a mask, and scores, of PIECE x prompt


def whole_slots(wanted: int) -> int:
    """The cache size for `wanted` slots: prompts of similar length share a graph, and kernels find their alignment."""
    return -(-wanted // SLOTS) * SLOTS


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as one CUDA graph on a GPU, itself elsewhere. Capturing runs it, so its buffers are to be reset after."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles kernels and makes workspaces, neither of which may happen while capturing
        step()
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def norm(x: Tensor, module) -> Tensor:
    """RMSNorm, of transformers' or torch's module."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return F.rms_norm(x, module.weight.shape, module.weight, eps)


class StaticLLM:
    """A Qwen2 decoder that goes on by one position of every row, with keys and values in a cache of `slots`.

    Rows share the slot that is written next; which slots a row sees and its next rotary position are its own, so
    that shorter prompts are padded at the left.
    """

    def __init__(self, model: Qwen2Model, rows: int, slots: int):
        config, weight = model.config, model.embed_tokens.weight
        device, slots = weight.device, whole_slots(slots)
        self.model, self.rows, self.slots, self.dtype = model, rows, slots, weight.dtype
        self.kv_heads = config.num_key_value_heads
        self.groups = config.num_attention_heads // self.kv_heads
        self.head = model.layers[0].self_attn.head_dim
        cache = (len(model.layers), rows, slots, self.kv_heads, self.head)
        self.keys, self.values = (torch.zeros(cache, dtype=self.dtype, device=device) for _ in range(2))
        self.visible_RL = torch.zeros(rows, slots, dtype=torch.bool, device=device)
        self.positions_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        # One product and one rotation in the place of three and two: a copy of 1 GB for 7B's weights.
        attention = [layer.self_attn for layer in model.layers]
        self.qkv = [
            [torch.cat([getattr(p, kind) for p in (a.q_proj, a.k_proj, a.v_proj)]) for kind in ("weight", "bias")]
            for a in attention
        ]
        angles = torch.arange(slots, device=device)[:, None] * model.rotary_emb.inv_freq.float()
        self.cos_LE = angles.cos().repeat(1, 2).to(self.dtype)
        self.sin_LE = torch.cat([-angles.sin(), angles.sin()], dim=1).to(self.dtype)  # the sign of rotate_half

    def reset(self) -> None:
        self.visible_RL.zero_()
        self.positions_R.zero_()
        self.slot.zero_()

    def forget(self, rows: slice) -> None:
        """Begin `rows` anew at the next slot."""
        self.visible_RL[rows] = False
        self.positions_R[rows] = 0

    def prefill(self, embeds_RSH: Tensor, kept_RS: Tensor) -> None:
        """Read prompts, padded at the left where `kept` is false, into the reset cache."""
        length = kept_RS.size(1)
        slots_S = torch.arange(length, device=kept_RS.device)
        positions_RS = (kept_RS.cumsum(1) - 1).clamp(min=0)
        for start in range(0, length, PIECE):
            end = min(start + PIECE, length)
            now_P, before_L = slots_S[start:end, None], slots_S[:end]
            # Padding sees itself: a softmax over nothing would leave NaN in the cache, which no mask hides.
            seen_RPL = (kept_RS[:, None, :end] & (now_P >= before_L)) | (now_P == before_L)
            self._run(embeds_RSH[:, start:end], positions_RS[:, start:end], slots_S[start:end], seen_RPL)
        self.visible_RL[:, :length] = kept_RS
        self.positions_R.copy_(kept_RS.sum(1))
        self.slot.fill_(length)

    def step(self, embeds_RH: Tensor) -> Tensor:
        """(R, H) embeddings of every row's next position -> its normed hidden state (R, H)."""
        self.visible_RL.index_fill_(1, self.slot, True)
        hidden_RH = self._run(embeds_RH[:, None], self.positions_R[:, None], self.slot, self.visible_RL[:, None])[:, 0]
        self.positions_R += 1
        self.slot += 1
        return hidden_RH

    def _run(self, x_RSH: Tensor, positions_RS: Tensor, slots_S: Tensor, seen_RSL: Tensor) -> Tensor:
        (R, S), A, G, E, slots = positions_RS.shape, self.kv_heads, self.groups, self.head, seen_RSL.size(-1)
        unseen = torch.zeros(seen_RSL.shape, dtype=self.dtype, device=x_RSH.device).masked_fill_(~seen_RSL, -torch.inf)
        mask = unseen[:, None, None].expand(-1, -1, G, -1, -1).reshape(R, 1, G * S, slots)
        cos, sin = (table[positions_RS].view(R * S, 1, E) for table in (self.cos_LE, self.sin_LE))
        x = x_RSH.reshape(R * S, -1)
        for layer, (weight, bias), keys, values in zip(
            self.model.layers, self.qkv, self.keys, self.values, strict=True
        ):
            qkv = linear(norm(x, layer.input_layernorm), weight, bias).view(R * S, -1, E)
            qk, v = qkv[:, : A * (G + 1)], qkv[:, A * (G + 1) :]
            qk = torch.addcmul(qk * cos, qk.roll(E // 2, -1), sin)
            q, k = qk[:, : A * G], qk[:, A * G :]
            keys.index_copy_(1, slots_S, k.view(R, S, A, E))
            values.index_copy_(1, slots_S, v.view(R, S, A, E))
            # The query heads of one key-value head as its queries: its keys are read once, and never repeated.
            q = q.view(R, S, A, G, E).permute(0, 2, 3, 1, 4).reshape(R, A, G * S, E)
            k, v = keys[:, :slots].transpose(1, 2), values[:, :slots].transpose(1, 2)
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            attended = attended.view(R, A, G, S, E).permute(0, 3, 1, 2, 4).reshape(R * S, -1)
            x = linear(attended, layer.self_attn.o_proj.weight, residual_RN=x)
            mlp = layer.mlp
            between = gated(norm(x, layer.post_attention_layernorm), mlp.gate_proj.weight, mlp.up_proj.weight)
            x = linear(between, mlp.down_proj.weight, residual_RN=x)
        return norm(x, self.model.norm).view(R, S, -1)


class StaticHead:
    """A visual head that goes on by one depth of every row, with the depths before in a cache."""

    def __init__(self, head: DepthHead, codebook_KC: Tensor, rows: int):
        self.head, self.codebook_KC = head, codebook_KC
        self.depth, width = head.depth_embedding.shape
        like = head.depth_embedding
        self.qkv = like.new_zeros(len(head.layers), rows, self.depth, 3 * width)
        self.embedded_RC = codebook_KC.new_zeros(rows, codebook_KC.size(1))  # the sum of the codes so far

    def first(self, hidden_RH: Tensor) -> Tensor:
        """(R, K) logits of depth 0."""
        self.embedded_RC.zero_()
        project, gelu, again = self.head.projector
        x_RW = linear(gelu(linear(hidden_RH, project.weight, project.bias)), again.weight, again.bias)
        return self._logits(0, x_RW)

    def next(self, d: int, codes_R: Tensor) -> Tensor:
        """(R, K) logits of depth d, given the codes of depth d - 1."""
        self.embedded_RC += F.embedding(codes_R, self.codebook_KC)
        project = self.head.code_projector
        return self._logits(d, F.linear(self.embedded_RC.to(project.weight.dtype), project.weight, project.bias))

    def _logits(self, d: int, x_RW: Tensor) -> Tensor:
        x_RW = x_RW + self.head.depth_embedding[d]
        for layer, cache in zip(self.head.layers, self.qkv, strict=True):
            cache[:, d] = linear(norm(x_RW, layer.attention_norm), layer.qkv.weight)
            q, k, v = cache[:, : d + 1].unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
            attended_RW = F.scaled_dot_product_attention(q[:, :, d:], k, v).flatten(1)
            x_RW = linear(attended_RW, layer.out.weight, residual_RN=x_RW)
            gate, up = layer.gate_up.weight.chunk(2)
            x_RW = linear(gated(norm(x_RW, layer.ffn_norm), gate, up), layer.down.weight, residual_RN=x_RW)
        return linear(norm(x_RW, self.head.norm), self.head.classifiers[d])


class Sampler:
    """Codes by inverse CDF of numbers that were drawn beforehand, so that sampling needs no host and no generator.

    A call takes (..., K) logits and as many numbers in [0, 1); of the `top_k` likeliest, the fewest that hold
    `top_p` are kept. temperature and top_p are tensors: a captured graph reads what they hold then.
    """

    def __init__(self, top_k: int, device: torch.device):
        self.top_k = top_k
        self.temperature, self.top_p = (torch.ones((), device=device) for _ in range(2))

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        values, codes = logits.topk(min(self.top_k, logits.size(-1)))
        probabilities = F.softmax(values / self.temperature, dim=-1)
        before = probabilities.cumsum(-1) - probabilities
        cumulative = probabilities.masked_fill(before >= self.top_p, 0.0).cumsum(-1)
        rank = (cumulative < uniform[..., None] * cumulative[..., -1:]).sum(-1, keepdim=True)
        return codes.gather(-1, rank).squeeze(-1)
