"""What a run writes about its steps: metrics.jsonl, wandb and a progress bar, all from rank 0."""

import contextlib
import dataclasses
import json
import math
import os
import secrets
import sys
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm

from megadual.config import PretrainConfig
from megadual.train.record import read_starts
from megadual.train.wandb_file import mend_wandb_files, steps_in_wandb_files

INIT_S, FINISH_S = 30, 60  # how long wandb is waited for, unless WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT say


class MetricsLog:
    """Appends one JSON object per step to run.dir/metrics.jsonl and sends it to wandb.

    A resumed run first drops the lines of steps that the checkpoint does not contain, so that no step appears
    twice. wandb has one run for all starts and takes nothing back: it gets each step once, since a repeated one has
    the same numbers, and what a kill, a power cut or a server that was away kept from it is sent again from
    metrics.jsonl by the next start. No failure of wandb ends training.
    """

    def __init__(self, run: PretrainConfig, start_step: int):
        folder = Path(run.run.dir)
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start_step]
        partial = path.with_name(".metrics.jsonl")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self.file = open(path, "a")
        self.wandb, self.sent = None, 0
        if run.run.wandb != "disabled":
            with self._wandb_may_fail():
                self.wandb, self.sent = _open_wandb(run)
            for line in kept:
                self._to_wandb(json.loads(line))
        self.bar = tqdm(
            total=run.train.steps,
            initial=start_step,
            desc="pretrain",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )

    def step(self, entry: dict) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        self._to_wandb(entry)
        self.bar.set_postfix(
            {name: _short(entry[f"loss_{name}"]) for name in ("text", "semantic", "pixel")}, refresh=False
        )
        self.bar.update()

    def picture(self, step: int, path: Path | None) -> None:
        """Show what was drawn, if anything was; anything but a picture tells why it was not."""
        if path is None:
            return
        if path.suffix != ".png":
            self.bar.write(f"warning: no samples were drawn: see {path}", sys.stderr)
        elif self.wandb and step > self.sent:
            import wandb

            with self._wandb_may_fail():
                self.wandb.log({"samples": wandb.Image(str(path), caption=f"step {int(path.stem)}")}, step=step)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb:
            with self._wandb_may_fail():
                self.wandb.finish()

    def _to_wandb(self, entry: dict) -> None:
        if self.wandb and entry["step"] > self.sent:
            with self._wandb_may_fail():
                self.wandb.log(entry, step=entry["step"])

    @contextlib.contextmanager
    def _wandb_may_fail(self):
        """Go on without wandb where its server does not answer, or the process that sends is dead."""
        import wandb  # large, and not installed on every machine that trains

        try:
            yield
        except (wandb.Error, ConnectionError, TimeoutError) as error:
            self.wandb = None
            message = "warning: training goes on without wandb, the next start sends the missing steps: "
            tqdm.write(message + " ".join(str(error).split()), sys.stderr)


def _open_wandb(run: PretrainConfig):
    """The run's one wandb run, and the last step that it has."""
    import wandb

    folder = Path(run.run.dir)
    starts = {f"start_{number}": start for number, start in enumerate(read_starts(folder), 1)}
    id_file = folder / "wandb_id"
    run_id = id_file.read_text() if id_file.is_file() else ""
    if not run_id:
        run_id = secrets.token_hex(4)
        id_file.write_text(run_id)
    online = run.run.wandb == "online"
    if not online:
        mend_wandb_files(folder)
    opened = wandb.init(
        project=run.run.wandb_project,
        name=run.run.name,
        group=run.run.name,
        id=run_id,
        resume="allow" if online else None,
        dir=str(folder),
        mode=run.run.wandb,
        config=OmegaConf.to_container(OmegaConf.structured(run)) | starts,
        settings=wandb.Settings(
            silent=True,
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_S)),
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_S)),  # without one it tries for days
            finish_timeout_raises=True,
        ),
    )
    # Online the server says what it has.
    return opened, opened.starting_step - 1 if online else max(steps_in_wandb_files(folder), default=0)


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def entry_of(step: int, result, **more) -> dict:
    """One line of metrics.jsonl; null stands for what is not finite, which JSON has no word for."""
    return {name: _finite(value) for name, value in {"step": step, **dataclasses.asdict(result), **more}.items()}


def _finite(value):
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
