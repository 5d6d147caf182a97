"""Train a DualToken tokenizer.

On a cluster: sbatch slurm/train_tokenizer.sh, or torchrun --nproc_per_node N pretrain/train_tokenizer.py --config FILE
... On one machine `python pretrain/train_tokenizer.py ...` does: it starts run.ranks processes itself, by default one.
"""

import sys

from megadual.config import parse_command_line, to_yaml
from megadual.errors import command
from megadual.run.launch import hush_libraries, launched
from megadual.run.local import become_ranks, hold_stop_signals


@command
def main(argv: list[str] | None = None) -> None:
    hush_libraries()
    from megadual.vision.recipe import TrainTokenizerConfig, check, plan  # takes seconds, as torch does
    from megadual.vision.train import train

    config, args = parse_command_line(TrainTokenizerConfig, __doc__, argv)
    place, alone = launched(args.dry_run), config.run.ranks or 1
    if args.dry_run:
        if not place or place.rank == 0:
            print(to_yaml(config))
            print(plan(config, ranks=place.world if place else alone))
        return
    check(config)
    if not place and alone > 1:
        become_ranks(alone, __file__, sys.argv[1:] if argv is None else argv)
    config.run.use_device()
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in train(config).items())
    if not place or place.rank == 0:
        print(f"{config.run.dir}/dualtoken: {metrics or 'was trained already'}")


if __name__ == "__main__":
    hold_stop_signals()
    main()
