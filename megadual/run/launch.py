"""What a launcher says of this process: torchrun, slurm/rank.sh and megadual/run/local.py set it in the environment."""

import os
import warnings
from dataclasses import dataclass

from megadual.errors import UserError
from megadual.run.local import STORE


class LaunchError(UserError):
    """The environment does not say where this process stands among the ranks."""

    own = True


@dataclass(frozen=True)
class Launch:
    """This process is the rank `rank` of `world`."""

    rank: int
    world: int


def launched(dry_run: bool = False) -> Launch | None:
    """Where this process stands; None where no launcher started it. LaunchError for what can't be right.

    WORLD_SIZE alone is enough for a dry run, which plans for so many.
    """
    if "RANK" not in os.environ and ("WORLD_SIZE" not in os.environ or dry_run):
        _check_srun()
        return Launch(0, _number("WORLD_SIZE", 1)) if "WORLD_SIZE" in os.environ else None
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if rank >= world:
        raise LaunchError(f"RANK={rank} is not below WORLD_SIZE={world}: ranks count from 0; mend the launcher")
    if world > 1 and not dry_run and STORE not in os.environ:
        _number("LOCAL_RANK", 0)
        if not os.environ.get("MASTER_ADDR"):
            raise LaunchError(f"WORLD_SIZE={world} needs MASTER_ADDR, the host of rank 0, in the environment")
        _number("MASTER_PORT", 1, 65535)
    return Launch(rank, world)


def _number(name: str, least: int, most: int | None = None) -> int:
    """A variable's whole number."""
    given = os.environ.get(name)
    if given is None:
        others = ", ".join(f"{each}={os.environ[each]}" for each in ("RANK", "WORLD_SIZE") if each in os.environ)
        raise LaunchError(
            f"{name} is not in the environment, but {others}: a launcher (torchrun, slurm/rank.sh) sets them all; to "
            "start without one, unset these"
        )
    if not given.isdecimal() or int(given) < least or most is not None and int(given) > most:
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise LaunchError(f"{name}={given!r} in the environment must be a whole number, {bounds}; mend the launcher")
    return int(given)


def _check_srun() -> None:
    """Tasks of one srun that do not know of each other would train the same thing, each by itself."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise LaunchError(
            f"srun has started {tasks} tasks, which RANK and WORLD_SIZE do not tell apart: put `bash slurm/rank.sh` in "
            "front of the command, as slurm/pretrain.sh does"
        )


def hush_libraries() -> None:
    """Leave out, on all ranks but 0, what libraries say alike on each of them. To be called before they load."""
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", module=r"(torch|megatron|deepspeed|transformers)\b")
