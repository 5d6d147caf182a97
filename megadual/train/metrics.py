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
from megadual.train.wandb_file import steps_in_wandb_files


class MetricsLog:
    """Appends one JSON object per step to run.dir/metrics.jsonl and sends it to wandb.

    A resumed run first drops the lines of steps that the checkpoint does not contain, so that no step appears
    twice. wandb has one run for all starts and takes nothing back: it gets each step once, since a repeated one has
    the same numbers, and what a power cut kept from it is sent again from metrics.jsonl.
    """

    def __init__(self, run: PretrainConfig, start_step: int):
        folder = Path(run.run.dir)
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start_step]
        path.write_text("".join(kept))
        self.file = open(path, "a")
        id_file = folder / "wandb_id"
        run_id = id_file.read_text() if id_file.is_file() else secrets.token_hex(4)
        id_file.write_text(run_id)
        starts = read_starts(folder)
        self.wandb, self.sent = None, 0
        if run.run.wandb != "disabled":
            self.sent = max(steps_in_wandb_files(folder), default=0)
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
            if run.run.wandb == "online":  # the server knows best
                self.sent = self.wandb.starting_step - 1
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

            self.wandb.log({"samples": wandb.Image(str(path), caption=f"step {int(path.stem)}")}, step=step)

    def _to_wandb(self, entry: dict) -> None:
        if self.wandb and entry["step"] > self.sent:
            self.wandb.log(entry, step=entry["step"])

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
