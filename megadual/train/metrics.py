"""What a run writes about its steps: metrics.jsonl, wandb and a progress bar, all from rank 0."""

import dataclasses
import json
import secrets
import sys
from pathlib import Path

import wandb
from omegaconf import OmegaConf
from tqdm import tqdm

from megadual.config import PretrainConfig


class MetricsLog:
    """Appends one JSON object per step to run.dir/metrics.jsonl and sends it to wandb.

    A resumed run first drops the lines of steps that the checkpoint does not contain, so that no step
    appears twice.
    """

    def __init__(self, run: PretrainConfig, start_step: int):
        folder = Path(run.run.dir)
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start_step]
        path.write_text("".join(kept))
        self.file = open(path, "a")
        id_file = folder / "wandb_id"
        run_id = id_file.read_text() if id_file.is_file() else secrets.token_hex(4)
        id_file.write_text(run_id)
        self.wandb = wandb.init(
            project=run.run.wandb_project,
            name=run.run.name,
            id=run_id,
            resume="allow" if run.run.wandb == "online" else None,
            dir=str(folder),
            mode=run.run.wandb,
            config=OmegaConf.to_container(OmegaConf.structured(run)),
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
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        self.wandb.log(entry, step=entry["step"])
        self.bar.set_postfix(
            {name: f"{entry[f'loss_{name}']:.3f}" for name in ("text", "semantic", "pixel")}, refresh=False
        )
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.wandb.finish()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.is_file() else []


def entry_of(step: int, result, **more) -> dict:
    """One line of metrics.jsonl."""
    return {"step": step, **dataclasses.asdict(result), **more}
