"""What a run writes about its steps: metrics.jsonl, wandb and a progress bar, all from rank 0."""

import dataclasses
import json
import math
import secrets
import sys
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm

from megadual.config import PretrainConfig
from megadual.train.record import read_starts


class MetricsLog:
    """Appends one JSON object per step to run.dir/metrics.jsonl and sends it to wandb.

    A resumed run first drops the lines of steps that the checkpoint does not contain, so that no step appears
    twice. wandb, which takes nothing back, has one run for all starts and already got those steps from an earlier
    one: they are not sent again, since repeating them gives the same numbers.
    """

    def __init__(self, run: PretrainConfig, start_step: int):
        folder = Path(run.run.dir)
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        written = [(json.loads(line)["step"], line) for line in lines if line.endswith("\n")]
        self.sent = max((step for step, _ in written), default=0)
        path.write_text("".join(line for step, line in written if step <= start_step))
        self.file = open(path, "a")
        id_file = folder / "wandb_id"
        run_id = id_file.read_text() if id_file.is_file() else secrets.token_hex(4)
        id_file.write_text(run_id)
        starts = read_starts(folder)
        self.wandb = None
        if run.run.wandb != "disabled":
            import wandb  # large, and not installed on every machine that trains

            self.wandb = wandb.init(
                project=run.run.wandb_project,
                name=run.run.name,
                group=run.run.name,
                id=run_id,
                resume="allow" if run.run.wandb == "online" else None,
                dir=str(folder),
                mode=run.run.wandb,
                config=OmegaConf.to_container(OmegaConf.structured(run)) | {f"start_{len(starts)}": starts[-1]},
                settings=wandb.Settings(silent=True),
            )
        self.bar = tqdm(
            total=run.train.steps,
            initial=start_step,
            desc="pretrain",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )

    def step(self, entry: dict) -> None:
        # wandb first: a step in the file has been handed over, whatever happens next.
        if self.wandb and entry["step"] > self.sent:
            self.wandb.log(entry, step=entry["step"])
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        self.bar.set_postfix(
            {name: _short(entry[f"loss_{name}"]) for name in ("text", "semantic", "pixel")}, refresh=False
        )
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def entry_of(step: int, result, **more) -> dict:
    """One line of metrics.jsonl; null stands for what is not finite, which JSON has no word for."""
    return {name: _finite(value) for name, value in {"step": step, **dataclasses.asdict(result), **more}.items()}


def _finite(value):
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
