"""Parts of a tiny run's steps, saved and taken up again, for tests: workers of `run_distributed`."""

from megadual.testing import tiny
from megadual.train.checkpoint import Checkpointer
from megadual.train.config import PretrainConfig
from megadual.train.metrics import numbers_of


def train_part(run: PretrainConfig, start: int, stop: int, save: bool):
    """Steps start..stop; on from the latest checkpoint if start > 0. Returns the losses and this rank's weights."""
    engine, data = tiny.build(run)
    checkpointer = Checkpointer(run)
    if start:
        assert checkpointer.load(engine, checkpointer.latest())["step"] == start
    results = [numbers_of(engine.train_step(data.step(s))) for s in range(start, stop)]
    if save:
        checkpointer.save(engine, stop)
        checkpointer.finish()
    weights = {name: p.detach().cpu().clone() for name, p in engine.chunks[0].named_parameters()}
    engine.shutdown()
    return results, weights


def train_through(run: PretrainConfig, save_at: int) -> list[dict]:
    """All steps, with a checkpoint written in the background after one of them; the results."""
    engine, data = tiny.build(run)
    checkpointer, results = Checkpointer(run), []
    for s in range(run.train.steps):
        results.append(numbers_of(engine.train_step(data.step(s))))
        checkpointer.poll()
        if s + 1 == save_at:
            checkpointer.save(engine, save_at)
    checkpointer.finish()
    engine.shutdown()
    return results
