"""How runs stand: `python -m megadual.runs RUN_DIR ...`"""

import argparse
from pathlib import Path

from omegaconf import OmegaConf

from megadual.config import read_yaml
from megadual.errors import UserError, command
from megadual.run import lock
from megadual.run.checkpoints import CheckpointFolder
from megadual.run.record import read_starts
from megadual.run.step_log import METRICS, read_metrics


def describe(folder: Path) -> dict[str, str]:
    """What there is to say of a run, by name; UserError where `folder` is none."""
    starts = read_starts(folder)
    if not starts:
        raise UserError(f"'{folder}' is not a run's folder: it has no run.json")
    config = OmegaConf.create(read_yaml(folder / "config.yaml"))  # of any training: the keys read are the same
    last, (steps, broken) = starts[-1], read_metrics(folder / METRICS, last=1000)
    about = {"run": f"{config.run.name} in {folder}", "state": _state(folder, last)}
    about["started"] = f"{last['time']} on {last['world']} processes, git {(last['git'] or 'unknown')[:12]}"
    if broken:
        about["broken"] = f"{broken} of the last lines of {METRICS}, left out here"
    if steps := steps[-20:]:
        step = steps[-1]
        parts = ", ".join(f"{name[5:]} {_number(value)}" for name, value in step.items() if name.startswith("loss_"))
        seen = f" ({step['tokens']:,} tokens)" if "tokens" in step else ""
        about["step"] = f"{step['step']:,} of {config.train.steps:,}{seen}"
        about["loss"] = _number(step.get("loss")) + (f" ({parts})" if parts else "")
        for unit in ("tokens", "images"):
            if speeds := [s[f"{unit}_per_s"] for s in steps if s.get(f"{unit}_per_s")]:
                about[f"{unit}/s"] = f"{sum(speeds) / len(speeds):,.0f} over {len(speeds)} steps"
        if "mfu" in step:
            about["MFU"] = f"{step['mfu']:.1%}" if step["mfu"] else "unknown device"
    about["restarts"] = str(len(starts) - 1) + "".join(f"\n  {s['time']}: {_end(s)}" for s in starts[:-1])
    about["last checkpoint"] = str(CheckpointFolder(folder, keep=1).latest() or "none")
    logs = folder / "logs"
    newest = max(
        (path for path in logs.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime, default=logs
    )
    about["logs"] = str(newest)
    if last["slurm"]:
        about["Slurm"] = ", ".join(f"{name} {value}" for name, value in last["slurm"].items())
    return about


def _state(folder: Path, last: dict) -> str:
    if "ended" in last:
        return _end(last)
    return "running" if lock.lives(folder / lock.LOCK) else "killed"


def _end(start: dict) -> str:
    return f"{start['ended']} at {start['ended_at']}" if "ended" in start else "killed"


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print how runs stand.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    args = parser.parse_args(argv)
    for folder in args.runs:
        for name, text in describe(folder).items():
            print(f"{name:<16} {text}")
        print()


if __name__ == "__main__":
    main()
