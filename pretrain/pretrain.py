"""Pretrain the unified LLM on shard sets of dual codes.

On a cluster: sbatch slurm/pretrain_7b.sh, or torchrun --nproc_per_node N pretrain/pretrain.py --config FILE ...
On one machine `python pretrain/pretrain.py ...` does: it starts run.ranks processes itself, by default tensor x
pipeline x context ones, or with parallel.layout=auto one for each GPU. `--dry-run --gpus N` plans a start on N GPUs
anywhere, and needs no data.
"""

import os
import sys

from megadual.config import parse_command_line, to_yaml
from megadual.engine.environment import set_environment
from megadual.engine.topology import topology
from megadual.errors import command
from megadual.run.launch import hush_libraries, launched
from megadual.run.local import become_ranks, hold_stop_signals
from megadual.train.config import PLANNED, PretrainConfig, check_picked


@command
def main() -> None:
    run, args = parse_command_line(PretrainConfig, __doc__, planned=PLANNED)
    elsewhere, parallel = args.gpus is not None, run.parallel
    place = None if elsewhere else launched(args.dry_run)
    check_picked(run, args.overrides)
    given = parallel.layout == "given"
    alone = run.run.ranks or (parallel.tensor * parallel.pipeline * parallel.context if given else None)
    world = place.world if place else args.gpus or alone
    if given:
        topology(run, world)

    set_environment(run)
    hush_libraries()
    world = world or _gpus() or 1
    if not place and not args.dry_run and world > 1:
        # Before anything large is loaded, which every rank does for itself; of their mistakes rank 0 speaks.
        become_ranks(world, __file__, sys.argv[1:])

    # From here on megatron-core is needed; a wrong config has been told before it loads.
    from megadual.engine import cpu

    cpu.install()
    from megadual.data.verification import verify
    from megadual.run.session import session
    from megadual.train import setup
    from megadual.train.assume import read_or_assume
    from megadual.train.loop import Loop

    inputs = read_or_assume(run) if elsewhere else setup.read_inputs(run)
    layout = setup.settle(run, world, inputs, here=not elsewhere)
    set_environment(run)  # again: the layout may have been picked just now
    if not elsewhere:
        setup.check_detector(run)
        setup.check_cache(run, layout, inputs)
    if args.dry_run:
        if not place or place.rank == 0:
            print(to_yaml(run) + "\n" + setup.plan(run, layout, inputs))
        return
    if not place:  # DeepSpeed asks for these
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with session(run.run, run) as opened:
        setup.check_agreed(run, opened.ranks)
        if run.data.verify:
            sets = [source.documents for source in inputs.sets + inputs.validation]
            files = verify(sets, opened.ranks, opened.beat)
            if opened.ranks.main:
                print(f"verified: {files:,} files of the shard sets are as they say", flush=True)
        engine = setup.engine(run, layout, inputs.vocabulary)
        opened.at_end(engine.shutdown)
        data = setup.dataset(run, inputs.sets, inputs.marks, layout, engine.data_rank)
        if opened.ranks.main:
            print(setup.plan(run, layout, inputs), flush=True)
            if data.dropped:
                limit = f"train.seq_len={run.train.seq_len}"
                print(f"warning: {data.dropped:,} documents are longer than {limit} and left out")
        loop = Loop(run, engine, data, opened)
        loop.hooks = setup.hooks(run, engine, inputs, layout, loop.log)
        loop.train()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    hold_stop_signals()
    main()
