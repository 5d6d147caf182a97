"""Train a DualToken tokenizer.

On a cluster: sbatch slurm/train_tokenizer.sh, or torchrun --nproc_per_node N pretrain/train_tokenizer.py --config FILE
... On one machine `python pretrain/train_tokenizer.py ...` does: it starts run.ranks processes itself, by default one.
"""

import os
import sys

from megadual.config import parse_command_line, to_yaml
from megadual.errors import command
from megadual.run.local import become_ranks, hold_stop_signals
from megadual.vision.recipe import TrainTokenizerConfig, check, plan
from megadual.vision.train import train


@command
def main(argv: list[str] | None = None) -> None:
    config, args = parse_command_line(TrainTokenizerConfig, __doc__, argv)
    alone = config.run.ranks or 1
    if args.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(to_yaml(config))
            print(plan(config, ranks=int(os.environ.get("WORLD_SIZE", alone))))
        return
    check(config)
    if "RANK" not in os.environ and alone > 1:
        become_ranks(alone, __file__, sys.argv[1:] if argv is None else argv)
    config.run.use_device()
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in train(config).items())
    if os.environ.get("RANK", "0") == "0":
        print(f"{config.run.dir}/dualtoken: {metrics or 'was trained already'}")


if __name__ == "__main__":
    hold_stop_signals()
    main()
