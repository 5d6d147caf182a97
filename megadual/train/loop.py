"""The training loop: data in, optimizer steps, metrics and checkpoints out."""

import time

import torch.distributed as dist

from megadual.config import PretrainConfig
from megadual.data.dataset import PackedDataset
from megadual.engine.megatron import MegatronEngine
from megadual.train.checkpoint import Checkpointer
from megadual.train.metrics import MetricsLog, entry_of


def train(run: PretrainConfig, engine: MegatronEngine, data: PackedDataset) -> None:
    """Run the configured steps, from the run folder's latest checkpoint where there is one."""
    checkpointer = Checkpointer(run)
    latest = checkpointer.latest() if run.checkpoint.resume else None
    start = checkpointer.load(engine, latest) if latest else 0
    log = MetricsLog(run, start) if dist.get_rank() == 0 else None
    if log and latest:
        log.bar.write(f"resumed from {latest}")

    batches = data.iterate(start)
    for step in range(start + 1, run.train.steps + 1):
        waited = time.perf_counter()
        microbatches = next(batches)
        begun = time.perf_counter()
        result = engine.train_step(microbatches)
        seconds = time.perf_counter() - begun
        if log:
            log.step(
                entry_of(
                    step,
                    result,
                    tokens=step * run.train.global_batch_tokens,
                    tokens_per_s=run.train.global_batch_tokens / seconds,
                    fill=sum(b.filled for b in microbatches) / sum(b.tokens.numel() for b in microbatches),
                    data_wait_s=begun - waited,
                )
            )
        if step % run.checkpoint.every == 0 or step == run.train.steps:
            checkpointer.save(engine, step)
    if log:
        log.close()
