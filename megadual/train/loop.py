"""The training loop: data in, optimizer steps, metrics and checkpoints out."""

import sys
import time

import torch.distributed as dist

from megadual.data.dataset import PackedDataset
from megadual.model.flops import peak_flops
from megadual.run import exits
from megadual.run.bad_loss import LossWatch
from megadual.run.session import Session
from megadual.train.checkpoint import Checkpointer
from megadual.train.config import PretrainConfig
from megadual.train.metrics import MetricsLog, entry_of
from megadual.train.sampling import Sampling


def train(run: PretrainConfig, engine, data: PackedDataset, session: Session) -> None:
    """Run the configured steps, from the run folder's latest checkpoint where there is one.

    Exits with exits.STOPPED after SIGTERM or SIGUSR1, once a checkpoint is written, and with exits.BAD_LOSS where a
    step's loss is not finite or spikes and is not to be skipped, or too many were.
    """
    sampling = Sampling(run)
    checkpointer = Checkpointer(run, sampling.start)
    if dist.get_rank() == 0:
        checkpointer.clean()
    latest = checkpointer.to_resume()
    progress = checkpointer.load(engine, latest) if latest else {"step": 0}
    session.beat()
    start, position = progress["step"], progress.get("data")
    same_rows = data.go_on(start, position) if position else True
    log = MetricsLog(run, start) if dist.get_rank() == 0 else None
    if log and latest:
        log.bar.write(f"resumed from {latest}")
        if not same_rows:
            log.bar.write(
                "warning: data.sets, data.weights or what else orders documents (train.seq_len, train.seed, ...) is "
                f"not as in {latest}; training goes on at row {data.rows_before(start):,} of the new order",
                sys.stderr,
            )
    watch = LossWatch(run.train)
    world, peak = dist.get_world_size(), peak_flops()

    batches, ended = data.iterate(start), time.perf_counter()
    for step in range(start + 1, run.train.steps + 1):
        waited = time.perf_counter()
        microbatches, position = next(batches)
        waited = time.perf_counter() - waited
        session.beat()
        result = engine.train_step(microbatches, watch.approve if watch.skips else None)
        # From one step's end to the next: what waits for data and for checkpoints is no faster for it.
        begun, ended = ended, time.perf_counter()
        seconds = ended - begun
        session.beat()
        if log:
            per_gpu = result.flops / seconds / world
            log.step(
                entry_of(
                    step,
                    result,
                    tokens=data.rows_before(step) * run.train.seq_len,
                    tokens_per_s=run.train.global_batch_tokens / seconds,
                    model_tflops=per_gpu / 1e12,
                    mfu=per_gpu / peak if peak else None,
                    data_wait_s=waited,
                )
            )
            log.samples(step, sampling.poll())
        if not watch.skips:
            watch.approve(result)
        checkpointer.poll()
        if watch.complaint:
            if watch.stops:
                checkpointer.finish()
            watch.tell(session.folder, step, [key for batch in microbatches for key in batch.keys], log)
            if watch.stops:
                sampling.stop()
                if log:
                    log.close()
                sys.exit(exits.BAD_LOSS)
        stopping = session.stop.agreed()
        if stopping or run.checkpoint.due(step, run.train.steps):
            checkpointer.save(engine, step, position)
            session.beat()
        if stopping and step < run.train.steps:
            checkpointer.finish()
            sampling.stop()
            if log:
                log.bar.write(f"stopped by a signal after step {step}; start again to go on")
                log.close()
            sys.exit(exits.STOPPED)
    checkpointer.finish()
    if log:
        log.samples(run.train.steps, sampling.finish())
        log.close()
