"""A training step without any of MegaDual's code: Hugging Face's Qwen2, plain depth heads, torch's AdamW.

Every document is a sequence of its own: nothing is packed, cut into micro-batches, fused or split over processes.

Shape suffixes: B documents of a step, L positions of the longest, P positions whose next one is drawn, D depths of a
stream, K codes of its codebook, C their width, H hidden width, W a head's width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True)
class Stream:
    """One stream of codes: its depth, and the frozen code vectors (K, C)."""

    name: str
    depth: int
    codebook: Tensor


@dataclass(frozen=True)
class HeadSizes:
    width: int
    layers: int
    heads: int
    ffn: int


@dataclass(frozen=True)
class Marks:
    """Ids of the special tokens."""

    end_of_text: int
    image: int  # stands at every position of an image
    look_at: int  # begins an image that is only looked at
    draw: int  # begins an image that is drawn
    answer: list[int]  # begins what the assistant says: <|im_start|>, assistant, newline
    im_end: int  # ends what somebody says; a newline follows


@dataclass(frozen=True)
class Document:
    """Token ids and, where they are Marks.image, each stream's codes (length, D)."""

    tokens: list[int]
    codes: dict[str, Tensor]

    def learned(self, marks: Marks) -> list[bool]:
        """Of each token, whether the model is to say it: everything, or in a conversation what the assistant says."""
        begins = [self.tokens[max(i - 3, 0) : i] == marks.answer for i in range(len(self.tokens))]
        if not any(begins):
            return [True] * len(self.tokens)
        said, speaking = [], False
        for token, begin in zip(self.tokens, begins, strict=True):
            said.append(speaking := speaking or begin)
            speaking = speaking and token != marks.im_end
        return said


@dataclass(frozen=True)
class Recipe:
    """How it is trained."""

    steps: int
    lr: float
    min_lr: float
    warmup: int
    decay: float
    betas: tuple[float, float]
    clip: float
    weights: dict[str, float]  # of "text" and of each stream in the total
    trained: tuple[str, ...]  # beginnings of the names of the parameters that are
    decay_vectors: bool = False  # biases and norms too
    shift: int = 1  # how many positions on the target of a position is
    mask_shift: int = 0  # how many positions too early a target has a loss


class DepthLayer(nn.Module):
    """Pre-norm causal attention and SwiGLU over the depths of one position."""

    def __init__(self, sizes: HeadSizes):
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * sizes.ffn, bias=False), nn.Linear(sizes.ffn, width, bias=False)

    def forward(self, x_PDW: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x_PDW)).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        x_PDW = x_PDW + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.ffn_norm(x_PDW)).chunk(2, dim=-1)
        return x_PDW + self.down(F.silu(gate) * up)


class DepthHead(nn.Module):
    """Logits of the D codes of the next position: I_1 the projected hidden state, I_d the codes before d, summed."""

    def __init__(self, hidden: int, sizes: HeadSizes, stream: Stream):
        super().__init__()
        width, (codes, code_dim) = sizes.width, stream.codebook.shape
        self.codebook = stream.codebook
        self.projector = nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, width))
        self.code_projector = nn.Linear(code_dim, width)
        self.depth_embedding = nn.Parameter(torch.zeros(stream.depth, width))
        self.layers = nn.ModuleList(DepthLayer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.classifiers = nn.Parameter(torch.zeros(stream.depth, codes, width))

    def forward(self, hidden_PH: Tensor, codes_PD: Tensor) -> Tensor:
        inputs = [self.projector(hidden_PH)]
        for d in range(1, codes_PD.size(1)):
            inputs.append(self.code_projector(self.codebook[codes_PD[:, :d]].sum(1)))
        x_PDW = torch.stack(inputs, dim=1) + self.depth_embedding
        for layer in self.layers:
            x_PDW = layer(x_PDW)
        x_PDW = self.norm(x_PDW)
        return torch.stack([x_PDW[:, d] @ weight_KW.T for d, weight_KW in enumerate(self.classifiers)], dim=1)


class Model(Qwen2ForCausalLM):
    """Qwen2 whose image positions come in through a projector, and a head for each stream."""

    def __init__(self, config: Qwen2Config, sizes: HeadSizes, streams: list[Stream]):
        super().__init__(config)
        hidden = config.hidden_size
        self.streams = streams
        width = sum(stream.codebook.size(1) for stream in streams)
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.heads = nn.ModuleDict({stream.name: DepthHead(hidden, sizes, stream) for stream in streams})

    def losses(self, documents: list[Document], marks: Marks, shift: int, mask_shift: int) -> dict[str, Tensor]:
        """Each mean cross-entropy of a step's documents: text's over tokens, a stream's over codes."""
        longest = max(len(document.tokens) for document in documents)
        # Nothing sees the padding: it stands behind the document, and attention is causal.
        ids_BL = torch.tensor([d.tokens + [marks.end_of_text] * (longest - len(d.tokens)) for d in documents])
        inputs_BLH = self.model.embed_tokens(ids_BL).clone()
        text, drawn, codes = [], [], {stream.name: [] for stream in self.streams}
        for b, document in enumerate(documents):
            image = torch.tensor(document.tokens) == marks.image
            if image.any():
                summed = [stream.codebook[document.codes[stream.name][image]].sum(1) for stream in self.streams]
                inputs_BLH[b, : len(document.tokens)][image] = self.projector(torch.cat(summed, dim=1))
            drawing, learned = False, document.learned(marks)
            learned = learned[mask_shift:] + learned[:mask_shift]
            for i, token in enumerate(document.tokens):
                drawing = (drawing or token == marks.draw) and token != marks.look_at
                target = i + shift
                if target >= len(document.tokens) or not learned[target]:
                    continue
                if document.tokens[target] != marks.image:
                    text.append((b, i, document.tokens[target]))
                elif drawing:
                    drawn.append((b, i))
                    for stream in self.streams:
                        codes[stream.name].append(document.codes[stream.name][target])
        hidden_BLH = self.model(inputs_embeds=inputs_BLH, use_cache=False).last_hidden_state
        rows, places, tokens = torch.tensor(text).T
        losses = {"text": F.cross_entropy(self.lm_head(hidden_BLH[rows, places]), tokens)}
        rows, places = torch.tensor(drawn).T
        for stream in self.streams:
            codes_PD = torch.stack(codes[stream.name])
            logits_PDK = self.heads[stream.name](hidden_BLH[rows, places], codes_PD)
            losses[stream.name] = F.cross_entropy(logits_PDK.flatten(0, 1), codes_PD.flatten())
        return losses


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of step 0, 1, ...: the warm-up's steps rise to lr by equal parts, the first being one; then a cosine."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / (recipe.warmup + 1)
    done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * done)) / 2


def train(model: Model, steps: list[list[Document]], marks: Marks, recipe: Recipe) -> list[dict[str, float]]:
    """Losses by name, their weighted sum `total`, `grad_norm` before clipping and `lr` of each step."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(recipe.trained))
        if parameter.requires_grad:
            (decayed if parameter.dim() > 1 or recipe.decay_vectors else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas, eps=1e-8)
    results = []
    for step, documents in enumerate(steps):
        lr = learning_rate(recipe, step)
        losses = model.losses(documents, marks, recipe.shift, recipe.mask_shift)
        total = sum(recipe.weights[name] * loss for name, loss in losses.items())
        optimizer.zero_grad()
        total.backward()
        gradients = [p.grad for p in decayed + plain]
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients)).item()
        if norm > recipe.clip:
            for gradient in gradients:
                gradient.mul_(recipe.clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        results.append({name: loss.item() for name, loss in losses.items()})
        results[-1] |= {"total": total.item(), "grad_norm": norm, "lr": lr}
    return results
