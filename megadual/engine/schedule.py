"""The learning rate over a run's steps, the same for both engines: megatron-core's scheduler."""

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megadual.train.config import PretrainConfig

STYLES = {"cosine": "cosine", "constant": "constant", "wsd": "WSD"}  # as megatron-core calls them


def schedule(run: PretrainConfig, optimizer) -> OptimizerParamScheduler:
    """Linear warm-up, then `train.schedule`; sets the rate of `optimizer`'s groups at every `step`."""
    train = run.train
    return OptimizerParamScheduler(
        optimizer,
        init_lr=train.lr / (train.warmup_steps + 1),
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.warmup_steps,
        lr_decay_steps=max(train.steps, train.warmup_steps + 1),
        lr_decay_style=STYLES[train.schedule],
        lr_wsd_decay_style="linear",
        wsd_decay_steps=train.decay_steps,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train.steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
