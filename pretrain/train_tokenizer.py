"""Train a DualToken tokenizer: `python pretrain/train_tokenizer.py --config FILE key=value ...` (or under torchrun)"""

from megadual.config import parse_command_line, to_yaml
from megadual.errors import command
from megadual.vision.data import list_shards
from megadual.vision.train import TrainTokenizerConfig, check, train


@command
def main(argv: list[str] | None = None) -> None:
    config, args = parse_command_line(TrainTokenizerConfig, __doc__, argv)
    check(config)
    if args.dry_run:
        print(to_yaml(config))
        print(
            f"plan: {config.steps} steps of {config.accumulate} x {config.data.batch_size} images per rank "
            f"from {len(list_shards(config.data.train))} shards -> {config.output}/dualtoken"
        )
        return
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in train(config).items())
    print(f"{config.output}/dualtoken: {metrics or 'was trained already'}")


if __name__ == "__main__":
    main()
