"""Pretrain the unified LLM on shard sets of dual codes.

On a cluster: torchrun --nproc_per_node N pretrain/pretrain.py --config pretrain/configs/tiny.yaml key=value ...
On one machine `python pretrain/pretrain.py ...` does: it starts tensor x pipeline processes itself.
"""

import os
import sys

from megadual.engine import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megadual.config import PretrainConfig, parse_command_line, to_yaml  # noqa: E402
from megadual.engine.topology import topology  # noqa: E402
from megadual.errors import command  # noqa: E402
from megadual.model import presets  # noqa: E402


@command
def main() -> None:
    run, args = parse_command_line(PretrainConfig, __doc__)
    run.model = presets.resolve(run.model)
    launched = "RANK" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else run.parallel.tensor * run.parallel.pipeline
    layout = topology(run, world)

    from megadual.train import setup
    from megadual.train.loop import train

    inputs = setup.read_inputs(run)
    if args.dry_run:
        print(to_yaml(run) + "\n" + setup.plan(run, layout, inputs))
        return
    if not launched and world > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        os.execv(sys.executable, [*torchrun, os.path.abspath(__file__), *sys.argv[1:]])

    if not launched:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    engine = setup.engine(run, layout, inputs)
    if dist.get_rank() == 0:
        print(setup.plan(run, layout, inputs), flush=True)
    train(run, engine, setup.dataset(run, inputs.sets, inputs.special, layout, engine.data_rank))
    engine.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
