"""The training loop: data in, optimizer steps, metrics and checkpoints out."""

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megadual.data.dataset import PackedDataset
from megadual.model.flops import peak_flops
from megadual.run import exits
from megadual.run.bad_loss import LossWatch
from megadual.run.hooks import Hook
from megadual.run.session import Session
from megadual.train.checkpoint import Checkpointer
from megadual.train.config import PretrainConfig
from megadual.train.metrics import MetricsLog, entry_of


class Loop:
    """A run's steps, from the run folder's latest checkpoint where there is one."""

    def __init__(self, run: PretrainConfig, engine, data: PackedDataset, session: Session):
        """Fills the engine from the checkpoint and finds the data's place; opens the log (rank 0)."""
        self.run, self.engine, self.data, self.session = run, engine, data, session
        self.hooks: Sequence[Hook] = ()  # called in their order
        self.checkpointer = Checkpointer(run, self._after_checkpoint)
        if session.ranks.main:
            self.checkpointer.clean()
        latest = self.checkpointer.to_resume()
        begun = time.perf_counter()
        progress = self.checkpointer.load(engine, latest) if latest else {"step": 0}
        loaded = time.perf_counter() - begun
        session.beat()
        if run.checkpoint.every:
            engine.prepare_to_save()
        self.start, position = progress["step"], progress.get("data")
        same_rows = data.resume(self.start, position) if position else True
        self.log = MetricsLog(run, self.start) if session.ranks.main else None
        if self.log and latest:
            self.log.message(f"resumed from {latest}, read in {loaded:.1f} s", sys.stdout)
            if not same_rows:
                self.log.message(
                    "warning: data.sets or what else orders documents (train.seq_len, train.seed, ...) "
                    f"is not as in {latest}; training goes on at row {data.rows_before(self.start):,} of the new order"
                )

    def train(self) -> None:
        """Run the steps that are left.

        Exits with exits.STOPPED after a signal (StopSignal), once a checkpoint is written, and with exits.BAD_LOSS
        where a step's loss is not finite or spikes and is not to be skipped, or too many were.
        """
        run, session, watch = self.run, self.session, LossWatch(self.run.train)
        # What there is by now stays. Looking through all of it again takes Python tenths of a second, at times of its
        # own on each rank, and the others wait.
        gc.collect()
        gc.freeze()
        batches, ended, held = self.data.iterate(self.start), time.perf_counter(), 0.0
        for step in range(self.start + 1, run.train.steps + 1):
            for hook in self.hooks:
                hook.before_step(step)
            waited = time.perf_counter()
            microbatches, position = next(batches)
            waited = time.perf_counter() - waited
            session.beat()
            result = self.engine.train_step(microbatches, watch.approve if watch.skips else None)
            # From one step's end to the next: what waits for data and for checkpoints is no faster for it.
            begun, ended = ended, time.perf_counter()
            session.beat()
            speed = self._speed(step, result, ended - begun)
            entry = entry_of(step, result, **speed, data_wait_s=waited, checkpoint_wait_s=held)
            for hook in self.hooks:
                hook.after_step(step, entry)
                session.beat()
            if self.log:
                self.log.step(entry)
            if not watch.skips:
                watch.approve(result)
            held = time.perf_counter()
            self.checkpointer.poll()
            if watch.complaint:
                if watch.stops:
                    self.checkpointer.finish()
                watch.report(session.folder, step, [key for batch in microbatches for key in batch.keys], self.log)
                if watch.stops:
                    self._end(exits.BAD_LOSS)
            stopping = session.stop.agreed()
            if stopping or run.checkpoint.due(step, run.train.steps):
                self.checkpointer.save(self.engine, step, position)
                session.beat()
            held = time.perf_counter() - held
            if stopping and step < run.train.steps:
                self.checkpointer.finish()
                if self.log:
                    self.log.message(f"stopped by a signal after step {step}; start again to go on", sys.stdout)
                self._end(exits.STOPPED)
        self.checkpointer.finish()
        self._end()

    def _speed(self, step: int, result, seconds: float) -> dict[str, float | None]:
        per_gpu, peak = result.flops / seconds / dist.get_world_size(), peak_flops()
        return {
            "tokens": self.data.rows_before(step) * self.run.train.seq_len,
            "tokens_per_s": self.run.train.global_batch_tokens / seconds,
            "model_tflops": per_gpu / 1e12,
            "mfu": per_gpu / peak if peak else None,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        }

    def _after_checkpoint(self, checkpoint: Path) -> None:
        for hook in self.hooks:
            hook.after_checkpoint(checkpoint)

    def _end(self, code: int | None = None) -> None:
        """Close what is open, and exit with `code` where there is one."""
        for hook in self.hooks:
            hook.at_end(finished=code is None)
        if self.log:
            self.log.close()
        if code is not None:
            sys.exit(code)
