"""Pretrain the unified LLM on shard sets of dual codes.

torchrun --nproc_per_node N pretrain/pretrain.py --config pretrain/configs/tiny.yaml key=value ...
"""

import os
from pathlib import Path

from megadual.engine import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megadual.config import PretrainConfig, parse_command_line, to_yaml  # noqa: E402
from megadual.data.dataset import open_sets  # noqa: E402
from megadual.engine.topology import topology  # noqa: E402
from megadual.errors import command  # noqa: E402
from megadual.model import presets  # noqa: E402


@command
def main() -> None:
    run, args = parse_command_line(PretrainConfig, __doc__)
    run.model = presets.resolve(run.model)
    world = int(os.environ.get("WORLD_SIZE", run.parallel.tensor * run.parallel.pipeline))
    layout = topology(run, world)
    if args.dry_run:
        print(to_yaml(run))
        print(f"layout: {layout.describe(run)} on {world} processes, {layout.microbatches} micro-batches a step")
        return

    from megadual.train.loop import train
    from megadual.train.setup import build

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    engine, data = build(run, layout)
    train(run, engine, data)
    engine.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
