"""Parts of a tiny run's steps, saved and taken up again, for tests: workers of `run_distributed`."""

import torch.distributed as dist

from megadual.engine.topology import topology
from megadual.testing import tiny
from megadual.train import setup
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
    weights = tiny.weights_of(engine)
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


def train_and_save(run: PretrainConfig) -> None:
    """All steps of a run on inputs that are on disk, with a checkpoint at the end."""
    layout, inputs = topology(run, dist.get_world_size()), setup.read_inputs(run)
    engine = setup.engine(run, layout, inputs.vocabulary)
    data = setup.dataset(run, inputs.sets, inputs.marks, layout, engine.data_rank)
    for step in range(run.train.steps):
        engine.train_step(data.step(step))
    checkpointer = Checkpointer(run)
    checkpointer.save(engine, run.train.steps)
    checkpointer.finish()
    engine.shutdown()
