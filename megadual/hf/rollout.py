"""Writes on from prompts, text token by text token and image position by image position, each one captured step.

Shape suffixes: R rows = `branches` x B images, B images or texts, S positions of a prompt, N positions of an image,
T streams, D code depth, K codebook size, H the LLM's width, V vocabulary, L cache slots.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from megadual.hf.decoding import Sampler, StaticHead, StaticLLM, captured
from megadual.kernels.few_rows import linear
from megadual.streams import STREAMS


class Rollout:
    """The state of `images` texts or images that are written together.

    With two branches the second half of the rows is the same without its captions, for guidance. `choose(position,
    d, logits (T, B, K))`, where given, takes the place of sampling codes; it may use the host, so nothing is captured.
    """

    def __init__(
        self,
        model,
        images: int,
        branches: int,
        slots: int,
        text_top_k: int = 1,
        code_top_k: int = 900,
        choose: Callable[[int, int, Tensor], Tensor] | None = None,
    ):
        self.model, self.images, self.branches, self.choose = model, images, branches, choose
        device, rows = model.device, images * branches
        config = model.dualtoken.config
        positions = config.grid[0] * config.grid[1]
        self.llm = StaticLLM(model.model, rows, slots)
        self.embeds_RH = torch.zeros(rows, model.config.text_config.hidden_size, dtype=self.llm.dtype, device=device)
        # text
        self.text_sampler = Sampler(text_top_k, device)
        self.text_uniform_LB = torch.zeros(self.llm.slots, images, device=device)
        self.bias_V = torch.zeros(model.config.text_config.vocab_size, device=device)  # -inf: not to be written
        self.tokens_B = torch.zeros(images, dtype=torch.int64, device=device)
        # images
        self.heads = [
            StaticHead(getattr(model, f"{stream}_head"), model.dualtoken.codebook(stream), rows) for stream in STREAMS
        ]
        self.code_sampler = Sampler(code_top_k, device)
        self.code_uniform_NDTB = torch.zeros(positions, config.depth, len(STREAMS), images, device=device)
        self.scale = torch.ones((), device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.codes_NTBD = torch.zeros(positions, len(STREAMS), images, config.depth, dtype=torch.int64, device=device)

    @cached_property
    def write(self) -> Callable[[], None]:
        """Feed `embeds_RH`, choose the next token of every text, and embed it. To be taken before `start`."""
        return captured(self._write, self.model.device)

    @cached_property
    def draw(self) -> Callable[[], None]:
        """Feed `embeds_RH`, choose the codes of every image's next position, and embed them. Likewise."""
        return self._draw if self.choose else captured(self._draw, self.model.device)

    def start(self, embeds_RSH: Tensor, kept_RS: Tensor) -> None:
        """Forget all, read prompts that are padded at the left where `kept` is false; the last position waits."""
        self.llm.reset()
        self.position.zero_()
        if kept_RS.size(1) > 1:
            self.llm.prefill(embeds_RSH[:, :-1], kept_RS[:, :-1])
        self.embeds_RH.copy_(embeds_RSH[:, -1])

    def say(self, token: int) -> None:
        """Let `token` be what every row is fed next."""
        self.embeds_RH.copy_(self.model.model.embed_tokens.weight[token])

    def _write(self) -> None:
        hidden_RH = self.llm.step(self.embeds_RH)
        uniform_B = self.text_uniform_LB.index_select(0, self.llm.slot - 1)[0]
        logits_BV = linear(hidden_RH[: self.images], self.model.lm_head.weight).float() + self.bias_V
        self.tokens_B.copy_(self.text_sampler(logits_BV, uniform_B))
        self.embeds_RH.copy_(self.model.model.embed_tokens(self.tokens_B).repeat(self.branches, 1))

    def _draw(self) -> None:
        hidden_RH = self.llm.step(self.embeds_RH)
        logits = [head.first(hidden_RH) for head in self.heads]
        codes = []
        for d in range(self.codes_NTBD.size(-1)):
            if d:
                rows_TR = codes[-1].repeat(1, self.branches)
                logits = [head.next(d, codes_R) for head, codes_R in zip(self.heads, rows_TR, strict=True)]
            logits_TRK = torch.stack(logits).float()
            if self.branches == 2:
                captioned_TBK, bare_TBK = logits_TRK.chunk(2, dim=1)
                logits_TRK = torch.lerp(bare_TBK, captioned_TBK, self.scale)
            codes.append(self._codes(d, logits_TRK))
        codes_TBD = torch.stack(codes, dim=-1)
        self.codes_NTBD.index_copy_(0, self.position, codes_TBD[None])
        self.embeds_RH.copy_(self.model.embed_codes(*codes_TBD).repeat(self.branches, 1))
        self.position += 1

    def _codes(self, d: int, logits_TBK: Tensor) -> Tensor:
        if self.choose:
            return self.choose(int(self.position), d, logits_TBK)
        return self.code_sampler(logits_TBK, self.code_uniform_NDTB.index_select(0, self.position)[0, d])
