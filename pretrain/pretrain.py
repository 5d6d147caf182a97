"""Pretrain the unified LLM on shard sets of dual codes.

On a cluster: sbatch slurm/pretrain_7b.sh, or torchrun --nproc_per_node N pretrain/pretrain.py --config FILE ...
On one machine `python pretrain/pretrain.py ...` does: it starts tensor x pipeline x context processes itself.
"""

import contextlib
import datetime
import os
import sys
from pathlib import Path

from megadual.config import PretrainConfig, parse_command_line, to_yaml
from megadual.engine.environment import set_environment
from megadual.engine.topology import Topology, topology
from megadual.errors import command
from megadual.model import presets


@command
def main() -> None:
    run, args = parse_command_line(PretrainConfig, __doc__)
    run.model = presets.resolve(run.model)
    launched = "RANK" in os.environ
    alone = run.parallel.tensor * run.parallel.pipeline * run.parallel.context
    world = int(os.environ["WORLD_SIZE"]) if launched else alone
    layout = topology(run, world)

    set_environment(run)

    # From here on torch and megatron-core are needed; a wrong config has been told before they load.
    from megadual.engine import cpu

    cpu.install()
    from megadual.train import setup

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
    sys.exit(pretrain(run, layout, inputs))


def pretrain(run: PretrainConfig, layout: Topology, inputs) -> int:
    """What each rank does, from the check of its node to the last step; returns the exit code."""
    import torch
    import torch.distributed as dist

    from megadual.engine.groups import collective_timeout_s
    from megadual.run import nodes, record
    from megadual.run.lock import sole_trainer
    from megadual.run.signals import EXIT_BAD_LOSS, EXIT_STOPPED
    from megadual.run.watchdog import Watchdog
    from megadual.train import setup
    from megadual.train.loop import train

    rank, world, folder = int(os.environ["RANK"]), layout.world, Path(run.run.dir)
    store = nodes.open_store(rank, world)
    peers = nodes.check_nodes(run, store, rank, world)
    with sole_trainer(folder, store, rank, world):
        watchdog = Watchdog(folder / "logs", rank, run.run.hang_timeout, peers)
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        timeout = datetime.timedelta(seconds=collective_timeout_s(run))
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        nodes.check_all_reduce(rank, world)
        engine = setup.engine(run, layout, inputs.vocabulary)
        data = setup.dataset(run, inputs.sets, inputs.special, layout, engine.data_rank)
        if rank == 0:
            print(setup.plan(run, layout, inputs), flush=True)
            if data.dropped:
                limit = f"train.seq_len={run.train.seq_len}"
                print(f"warning: {data.dropped:,} documents are longer than {limit} and left out")
            (folder / "config.yaml").write_text(to_yaml(run))
            record.add_start(folder, record.describe_start(world))
        code, ended = 0, "failed"
        try:
            train(run, engine, data, watchdog.beat)
            ended = "finished"
        except SystemExit as stop:  # on all ranks alike
            code, ended = stop.code, {EXIT_STOPPED: "stopped by a signal", EXIT_BAD_LOSS: "bad loss"}[stop.code]
        finally:
            if rank == 0:
                with contextlib.suppress(OSError):  # a full disk, which has been told already
                    record.end_start(folder, ended)
        dist.barrier()  # rank 0 may still have been sending to wandb, and launchers end ranks that others have left
        watchdog.close()
        engine.shutdown()
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    main()
