"""Running commands one after the other, each once: what is done is reused until its command or its config changes."""

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from megadual.run import exits

RECORD = "stages.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, what it does in a line, the file that is there once it is done, and what it goes on from."""

    name: str
    about: str
    arguments: str  # of `python`
    product: Path
    resumes: Path | None = None  # the folder of what can be stopped and go on; of another key it is removed

    def key(self, before: str) -> str:
        """Changes with the command, with the YAML it names, and with the stages before."""
        configs = [Path(a).read_text() for a in shlex.split(self.arguments) if a.endswith(".yaml")]
        return hashlib.sha256("\n".join([before, self.arguments, *configs]).encode()).hexdigest()


def done_key(plan: list[Stage], folder: Path) -> str | None:
    """The last stage's key, for what builds on these stages elsewhere; None where one is not done in `folder`."""
    done, key = _done(folder), ""
    for stage in plan:
        key = stage.key(key)
        if done.get(stage.name, {}).get("key") != key or not stage.product.exists():
            return None
    return key


def _done(folder: Path) -> dict:
    record = folder / RECORD
    return json.loads(record.read_text()) if record.is_file() else {}


def run_stages(plan: list[Stage], folder: Path, stop_after: float | None = None, before: str = "") -> dict[str, float]:
    """Run what is not done yet, its output shown as it comes; seconds that each stage took when it was done.

    `before` is the key of stages done elsewhere.

    Exits with a failed stage's code, and `stop_after` seconds from now with exits.STOPPED: a training stage has then
    saved a checkpoint and goes on from it, another is begun anew. `folder`/RECORD keeps what is done and what is begun.
    """

    def note(stage: Stage, state: str, seconds: float) -> None:
        done[stage.name] = {state: key, "seconds": round(seconds, 1)}
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(done, indent=2) + "\n")

    record, until = folder / RECORD, time.monotonic() + stop_after if stop_after else None
    done, key = _done(folder), before
    for number, stage in enumerate(plan, start=1):
        key = stage.key(key)
        print(f"== {number}/{len(plan)} {stage.name}: {stage.about}", flush=True)
        if done.get(stage.name, {}).get("key") == key and stage.product.exists():
            print("   reused", flush=True)
            continue
        last = done.get(stage.name, {})
        goes_on = last.get("begun") == key
        if stage.resumes and stage.name in done and not goes_on and stage.resumes.exists():
            print(f"   begun anew: '{stage.resumes}' is of another command or config, or of other stages", flush=True)
            shutil.rmtree(stage.resumes)
        for stale in plan[number:]:
            if stale.name in done:
                done[stale.name] = {}
        spent = last["seconds"] if goes_on else 0.0
        note(stage, "begun", spent)
        code, seconds = _run(stage, until)
        seconds += spent
        stopped = until is not None and code not in (0, exits.WRONG_INPUT) and time.monotonic() > until
        note(stage, "begun" if code else "key", seconds)
        if stopped:
            print(f"stopped in stage '{stage.name}' after {stop_after:g} s; start again to go on", flush=True)
            sys.exit(exits.STOPPED)
        if code:
            print(f"error: stage '{stage.name}' failed with exit code {code}", file=sys.stderr)
            sys.exit(code)
        print(f"   {seconds:.0f} s", flush=True)
    return {stage.name: done[stage.name]["seconds"] for stage in plan}


def _run(stage: Stage, until: float | None) -> tuple[int, float]:
    """The command's exit code and the seconds it took; at `until` (time.monotonic) it gets SIGTERM."""
    print(f"   $ python {stage.arguments}", flush=True)
    begun = time.monotonic()
    left = None if until is None else max(until - begun, 0.0)
    # By default OpenMP's threads spin for milliseconds at each barrier: where two programs that do so share the cores,
    # a step takes up to forty times as long as where they soon sleep.
    environment = {"GOMP_SPINCOUNT": "1000"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, *shlex.split(stage.arguments)], env=environment)
    try:
        code = process.wait(left)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    except BaseException:  # Ctrl-C, which the command got too
        process.wait()
        raise
    return code, time.monotonic() - begun
