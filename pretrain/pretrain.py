"""Pretrain the unified LLM on shard sets of dual codes.

On a cluster: torchrun --nproc_per_node N pretrain/pretrain.py --config pretrain/configs/tiny.yaml key=value ...
On one machine `python pretrain/pretrain.py ...` does: it starts tensor x pipeline processes itself.
"""

import os
import sys
from pathlib import Path

from megadual.config import PretrainConfig, parse_command_line, to_yaml
from megadual.engine.topology import topology
from megadual.errors import command
from megadual.model import presets


@command
def main() -> None:
    run, args = parse_command_line(PretrainConfig, __doc__)
    run.model = presets.resolve(run.model)
    launched = "RANK" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else run.parallel.tensor * run.parallel.pipeline
    layout = topology(run, world)

    # From here on torch and megatron-core are needed; a wrong config has been told before they load.
    from megadual.engine import cpu

    cpu.install()
    import torch
    import torch.distributed as dist

    from megadual.train import setup
    from megadual.train.loop import train

    inputs = setup.read_inputs(run)
    if args.dry_run:
        print(to_yaml(run) + "\n" + setup.plan(run, layout, inputs))
        return
    if not launched and world > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // world)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        os.execv(sys.executable, [*torchrun, os.path.abspath(__file__), *sys.argv[1:]])
    if not launched:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    engine = setup.engine(run, layout, inputs.vocabulary)
    data = setup.dataset(run, inputs.sets, inputs.special, layout, engine.data_rank)
    if dist.get_rank() == 0:
        print(setup.plan(run, layout, inputs), flush=True)
        if data.dropped:
            print(f"warning: {data.dropped:,} documents are longer than train.seq_len={run.train.seq_len} and left out")
        folder = Path(run.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(run))
    train(run, engine, data)
    engine.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
