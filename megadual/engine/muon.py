"""Muon: orthogonalised momentum for the matrices between hidden states, AdamW for all other parameters.

Momentum and fp32 weights lie as AdamW's do under megatron-core's distributed optimizer: of every parameter each
data-parallel rank has a flat share. For its update a matrix is brought together on one of the ranks that have shares of
it, is orthogonalised there as one process does it, and goes back to them. The matrices are dealt so that each rank has
about as much to do.

Shape suffixes: B matrices of one shape, M rows, N columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megadual.model.matrices import HiddenMatrix

# Newton-Schulz: x <- a x + b (x x') x + c (x x')^2 x takes singular values in (0, 1] to about 1 in five steps; these
# coefficients (Jordan et al., 2024) grow small ones fastest, and leave them between 0.7 and 1.2.
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
# An update's root mean square is this times the learning rate, which is what AdamW's usually is: so its rates serve
# (Liu et al., 2025).
RMS = 0.2
NUMBERS_AT_ONCE = 1 << 27  # that a rank orthogonalises at a time, of one matrix at least
SMALLEST = 1e-30  # norm


def work(rows: int, columns: int) -> int:
    """Multiply-adds of orthogonalising one matrix."""
    M, N = sorted((rows, columns))
    return STEPS * (2 * M * M * N + M**3)


def orthogonalized(x_BMN: torch.Tensor) -> torch.Tensor:
    """Updates of matrices with M <= N: their singular values made about equal, and scaled. Zeros stay zeros."""
    norm_B11 = torch.linalg.vector_norm(x_BMN, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x_BMN = x_BMN * (1 / norm_B11.clamp(min=SMALLEST)).to(x_BMN.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram_BMM = x_BMN @ x_BMN.mT
        factor_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        x_BMN = torch.baddbmm(x_BMN, factor_BMM, x_BMN, beta=a)
    return x_BMN.mul_(RMS * math.sqrt(x_BMN.size(2)))


def _orthogonalize(whole: list[list[torch.Tensor]]) -> None:
    """Put its update in each part's place, those of one shape at once."""
    of_shape = defaultdict(list)
    for parts in whole:
        for i, part in enumerate(parts):
            tall = part.size(0) > part.size(1)
            wide = part.mT if tall else part
            of_shape[wide.shape].append((parts, i, tall, wide))
    for placed in of_shape.values():
        updates_BMN = orthogonalized(torch.stack([wide for *_, wide in placed]))
        for (parts, i, tall, _), update in zip(placed, updates_BMN, strict=True):
            parts[i] = update.mT if tall else update


@dataclass
class _Dealt:
    """A matrix, which ranks of the group have what of it, and which one orthogonalises it."""

    matrix: HiddenMatrix
    main: torch.Tensor | None  # this rank's share of the fp32 weights, flat
    places: dict[int, slice]  # rank -> where its share is in the flat parameter of its tensor-parallel rank
    owner: int = 0
    sources: list[int] = field(default_factory=list)  # ranks whose shares together are the matrix

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return sum(work(*shape) for shape in self.matrix.shapes)


class Muon(torch.optim.AdamW):
    """Muon and AdamW over the parameter groups of megatron-core's distributed optimizer.

    State: `momentum` of a share of a matrix, AdamW's of the others. Every rank calls `step` together.
    """

    def __init__(
        self,
        groups: list[dict],
        matrices: list[HiddenMatrix],
        shares: list[tuple[slice, torch.Tensor] | None],
        momentum: float,
        dtype: torch.dtype,
    ):
        """`matrices` are those of this rank's chunks, `shares` what it has of them: where that is, the fp32 weights.

        Orthogonalises in `dtype`. Collective over the ranks that have shares.
        """
        super().__init__([torch.empty(0)])
        self.param_groups = groups  # whose weights may be views, which torch would refuse
        self.momentum, self.dtype = momentum, dtype
        self.group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self.rank = self.group.rank()
        of_all: list = [None] * self.group.size()
        tensor_rank, places = parallel_state.get_tensor_model_parallel_rank(), [share and share[0] for share in shares]
        dist.all_gather_object(of_all, (tensor_rank, places), group=self.group)
        self.tensor_ranks = [tensor_rank for tensor_rank, _ in of_all]
        dealt = [
            _Dealt(matrix, share and share[1], {rank: all_[i] for rank, (_, all_) in enumerate(of_all) if all_[i]})
            for i, (matrix, share) in enumerate(zip(matrices, shares, strict=True))
        ]
        self.rounds = self._deal(dealt)
        self.mains = [each.main for each in dealt if each.main is not None]
        ours = set(self.mains)
        self.group_of = {main: group for group in groups for main in group["params"] if main in ours}
        self.others = [[main for main in group["params"] if main not in ours] for group in groups]  # AdamW's
        for group in groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _deal(self, dealt: list[_Dealt]) -> list[list[_Dealt]]:
        """Give each matrix its owner; returns what is orthogonalised at a time, the most work first."""
        loads, ends = [0] * self.group.size(), [(0, 0)] * self.group.size()  # (its last round, numbers in that)
        rounds: dict[int, list[_Dealt]] = defaultdict(list)
        for each in sorted(dealt, key=lambda each: -each.work):
            owner = each.owner = loads.index(min(loads))
            loads[owner] += each.work
            # Of a matrix that is not split, each tensor-parallel rank has all of it.
            peer = None if each.matrix.split else self.tensor_ranks[owner]
            each.sources = [rank for rank in each.places if peer in (None, self.tensor_ranks[rank])]
            last, numbers = ends[owner]
            size = sum(math.prod(shape) for shape in each.matrix.shapes)
            if numbers and numbers + size > NUMBERS_AT_ONCE:
                last, numbers = last + 1, 0
            ends[owner] = last, numbers + size
            rounds[last].append(each)
        return [rounds[number] for number in sorted(rounds)]

    @torch.no_grad()
    def step(self, closure=None):
        if self.mains:
            gradients = [main.grad for main in self.mains]
            momenta = [self.state[main]["momentum"] for main in self.mains]
            torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
            torch._foreach_lerp_(gradients, momenta, self.momentum)  # Nesterov's
            torch._foreach_add_([self.state[main]["step"] for main in self.mains], 1)
        for dealt in self.rounds:
            self._update(dealt)
        everything = [group["params"] for group in self.param_groups]
        for group, others in zip(self.param_groups, self.others, strict=True):
            group["params"] = others
        super().step()
        for group, parameters in zip(self.param_groups, everything, strict=True):
            group["params"] = parameters

    def _update(self, dealt: list[_Dealt]) -> None:
        """Bring matrices together, orthogonalise them, give the updates back and apply them."""
        owned = [each for each in dealt if each.owner == self.rank]
        held = [(each, each.main) for each in dealt if each.main is not None]
        pieces = self._exchange(
            [(each.owner, main.grad) for each, main in held if self.rank in each.sources],
            [(source, _size(each.places[source])) for each in owned for source in each.sources],
        )
        arriving = iter(pieces)
        whole = [each.matrix.parts(self._joined(each, arriving)) for each in owned]
        del pieces, arriving
        _orthogonalize(whole)
        sent = []
        for each, parts in zip(owned, whole, strict=True):
            shares = [share.flatten() for share in each.matrix.shares(parts)]
            for rank, place in each.places.items():
                sent.append((rank, shares[self._which(each, rank)][place]))
        updates = self._exchange(sent, [(each.owner, main.numel()) for each, main in held])
        for (_, main), update in zip(held, updates, strict=True):
            group = self.group_of[main]
            main.mul_(1 - group["lr"] * group["weight_decay"])
            main.add_(update, alpha=-group["lr"])

    def _which(self, each: _Dealt, rank: int) -> int:
        """Which of the matrix's tensor-parallel shares the rank has a part of."""
        return self.tensor_ranks[rank] if each.matrix.split else 0

    def _joined(self, each: _Dealt, pieces: Iterator[torch.Tensor]) -> list[torch.Tensor]:
        """The matrix's tensor-parallel shares, of the pieces that its sources sent."""
        parameter = each.matrix.parameter
        shares = [
            torch.empty(parameter.numel(), dtype=self.dtype, device=parameter.device)
            for _ in {self._which(each, source) for source in each.sources}
        ]
        for source in each.sources:
            shares[self._which(each, source)][each.places[source]] = next(pieces)
        return [share.view(parameter.shape) for share in shares]

    def _exchange(self, sent: list[tuple[int, torch.Tensor]], due: list[tuple[int, int]]) -> list[torch.Tensor]:
        """Send flat tensors to ranks; returns those that are due from ranks, in `dtype`.

        `due` are (rank, size), in the order in which that rank sends them.
        """
        if self.group.size() == 1:
            return [tensor.to(self.dtype) for _, tensor in sent]
        sent = sorted(sent, key=lambda entry: entry[0])
        order = sorted(range(len(due)), key=lambda i: due[i][0])
        to, of = [0] * self.group.size(), [0] * self.group.size()
        for rank, tensor in sent:
            to[rank] += tensor.numel()
        for rank, size in due:
            of[rank] += size
        device = torch.cuda.current_device()
        outgoing = torch.empty(sum(to), dtype=self.dtype, device=device)
        incoming = torch.empty(sum(of), dtype=self.dtype, device=device)
        if sent:
            torch.cat([tensor.to(self.dtype) for _, tensor in sent], out=outgoing)
        dist.all_to_all_single(incoming, outgoing, of, to, group=self.group)
        pieces = dict(zip(order, incoming.split([due[i][1] for i in order]), strict=True))
        return [pieces[i] for i in range(len(due))]


def _size(place: slice) -> int:
    return place.stop - place.start
