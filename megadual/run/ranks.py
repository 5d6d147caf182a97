"""This process among those of its group, and what they tell each other."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadual.run.nodes import local_rank


@dataclass
class Ranks:
    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls) -> "Ranks":
        """Those of the default process group; rank 0 of 1 where there is none."""
        device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else cls(0, 1, device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; all ranks give the same keys."""
        if self.size == 1:
            return values
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(packed)
        return dict(zip(values, (packed / self.size).tolist(), strict=True))

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of a tensor, which may be changed in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values
