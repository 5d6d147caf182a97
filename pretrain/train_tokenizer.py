"""Train a DualToken tokenizer: `python pretrain/train_tokenizer.py --config FILE key=value ...` (or under torchrun)"""

import os

from megadual.config import parse_command_line, to_yaml
from megadual.errors import command
from megadual.vision.recipe import TrainTokenizerConfig, check, plan
from megadual.vision.train import train


@command
def main(argv: list[str] | None = None) -> None:
    config, args = parse_command_line(TrainTokenizerConfig, __doc__, argv)
    if args.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(to_yaml(config))
            print(plan(config, ranks=int(os.environ.get("WORLD_SIZE", 1))))
        return
    check(config)
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in train(config).items())
    print(f"{config.output}/dualtoken: {metrics or 'was trained already'}")


if __name__ == "__main__":
    main()
