"""Train a small SigLIP on image-caption pairs: `python pretrain/train_siglip.py --config FILE key=value ...`"""

from megadual.config import parse_command_line, to_yaml
from megadual.errors import command
from megadual.run.local import hold_stop_signals


@command
def main(argv: list[str] | None = None) -> None:
    from megadual.vision.data import list_shards  # takes seconds, as torch does
    from megadual.vision.siglip import TrainSiglipConfig, train

    config, args = parse_command_line(TrainSiglipConfig, __doc__, argv)
    if args.dry_run:
        print(to_yaml(config))
        pairs, shards = config.train.steps * config.data.batch_size, list_shards(config.data.train)
        print(f"plan: {config.train.steps} steps, {pairs} pairs from {len(shards)} shards -> {config.run.dir}")
        return
    config.run.use_device()
    metrics = train(config)
    print(f"{config.run.dir}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


if __name__ == "__main__":
    hold_stop_signals()
    main()
