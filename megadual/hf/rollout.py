"""Goes on from prompts, text token by text token and image position by image position, each one captured step.

Shape suffixes: R rows = `branches` x B images, B images or texts, S positions of a prompt, N positions of an image,
T streams, D a stream's code depth, K its codebook size, H the LLM's width, V vocabulary, L cache slots.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megadual.hf.decoding import Sampler, StaticHead, StaticLLM, captured
from megadual.kernels.few_rows import linear


class Rollout:
    """The state of `images` texts or images that go on together.

    `start` reads the prompts; then each `write()` adds a token to every text, each `draw()` a position to every image.

    `branches` is for guidance. With two, the second half of the rows is the same without what images are guided to:
    their logits become u + s (c - u), c those of the first half, u of the second. With three, rows with the source
    image alone stand between (InstructPix2Pix): u + s_image (i - u) + s (c - i). `choose(position, stream, d, logits
    (B, K))`, where given, takes the place of sampling codes; it may use the host, so nothing is captured.
    """

    def __init__(
        self,
        model,
        images: int,
        branches: int,
        slots: int,
        text_top_k: int = 1,
        code_top_k: int = 900,
        writes: bool = True,
        draws: bool = True,
        choose: Callable[[int, str, int, Tensor], Tensor] | None = None,
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
        streams = model.streams
        self.heads = {
            name: StaticHead(head, model.dualtoken.codebook(name), rows) for name, head in model.heads.items()
        }
        self.depth = max(stream.depth for stream in streams.values())
        # Codes among as many are sampled together.
        sizes = dict.fromkeys(stream.codebook_size for stream in streams.values())
        self.alike = [[name for name, stream in streams.items() if stream.codebook_size == size] for size in sizes]
        self.places = {name: t for t, name in enumerate(streams)}
        self.code_sampler = Sampler(code_top_k, device)
        self.code_uniform_NDTB = torch.zeros(positions, self.depth, len(streams), images, device=device)
        self.scale, self.image_scale = (torch.ones((), device=device) for _ in range(2))
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.codes_NBD = {
            name: torch.zeros(positions, images, stream.depth, dtype=torch.int64, device=device)
            for name, stream in streams.items()
        }

        # Capturing runs a step, so it is done before there is anything to go on from.
        self.write = captured(self._write, device) if writes else None
        self.draw = (self._draw if choose else captured(self._draw, device)) if draws else None

    def start(self, embeds_RSH: Tensor, kept_RS: Tensor) -> None:
        """Forget all, read prompts that are padded at the left where `kept` is false; the last position waits."""
        self.llm.reset()
        self.position.zero_()
        if kept_RS.size(1) > 1:
            self.llm.prefill(embeds_RSH[:, :-1], kept_RS[:, :-1])
        self.embeds_RH.copy_(embeds_RSH[:, -1])

    def feed(self, token: int) -> None:
        """Let `token` be what every row is fed next."""
        self.embeds_RH.copy_(self.model.model.embed_tokens.weight[token])

    def _write(self) -> None:
        """Feed `embeds_RH`, choose the next token of every text, and embed it."""
        hidden_RH = self.llm.step(self.embeds_RH)
        uniform_B = self.text_uniform_LB.index_select(0, self.llm.slot - 1)[0]
        logits_BV = linear(hidden_RH[: self.images], self.model.lm_head.weight).float() + self.bias_V
        self.tokens_B.copy_(self.text_sampler(logits_BV, uniform_B))
        self.embeds_RH.copy_(self.model.model.embed_tokens(self.tokens_B).repeat(self.branches, 1))

    def _draw(self) -> None:
        """Feed `embeds_RH`, choose the codes of every image's next position, and embed them."""
        hidden_RH = self.llm.step(self.embeds_RH)
        codes: dict[str, list[Tensor]] = {name: [] for name in self.heads}
        for d in range(self.depth):
            logits_RK = {}
            for name, head in self.heads.items():
                if d < head.depth:
                    before = codes[name]
                    logits_RK[name] = head.next(d, before[-1].repeat(self.branches)) if d else head.first(hidden_RH)
            for name, codes_B in self._codes(d, logits_RK).items():
                codes[name].append(codes_B)
        codes_BD = {name: torch.stack(each, dim=-1) for name, each in codes.items()}
        for name, drawn in self.codes_NBD.items():
            drawn.index_copy_(0, self.position, codes_BD[name][None])
        self.embeds_RH.copy_(self.model.embed_codes(codes_BD).repeat(self.branches, 1))
        self.position += 1

    def _codes(self, d: int, logits_RK: dict[str, Tensor]) -> dict[str, Tensor]:
        """The codes (B,) of depth d, by stream."""
        chosen = {}
        for alike in self.alike:
            names = [name for name in alike if name in logits_RK]
            if not names:
                continue
            logits_TBK = self._guided(torch.stack([logits_RK[name] for name in names]).float())
            if self.choose:
                position = int(self.position)
                codes = [self.choose(position, name, d, logits) for name, logits in zip(names, logits_TBK, strict=True)]
            else:
                uniform_TB = self.code_uniform_NDTB.index_select(0, self.position)[0, d]
                if len(names) < len(self.places):
                    uniform_TB = torch.stack([uniform_TB[self.places[name]] for name in names])
                codes = self.code_sampler(logits_TBK, uniform_TB)
            chosen |= dict(zip(names, codes, strict=True))
        return chosen

    def _guided(self, logits_TRK: Tensor) -> Tensor:
        """(T, B, K) of all branches together."""
        whole_TBK, *others = logits_TRK.chunk(self.branches, dim=1)
        if not others:
            return whole_TBK
        if len(others) == 1:
            return torch.lerp(others[0], whole_TBK, self.scale)
        image_TBK, none_TBK = others
        return torch.lerp(none_TBK, image_TBK, self.image_scale).addcmul_(self.scale, whole_TBK - image_TBK)
