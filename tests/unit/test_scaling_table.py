"""What benchmarks/scaling.py says of a run that ended early, whose last line is half written."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("steps, counted, tokens", [(9, 4, 7.5), (3, 2, 2.5), (1, 0, None), (0, 0, None)])
def test_the_steps_there_are(tmp_path, monkeypatch, steps, counted, tokens):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from scaling import Measured, read

    entries = [
        {"step": n, "loss": 1.0, "tokens": 8 * n, "tokens_per_s": 2.0 * n, "mfu": 0.1} for n in range(1, steps + 1)
    ]
    log = tmp_path / "metrics.jsonl"
    if steps:
        log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 10, "lo')
    got = Measured(gpus=2, work="", predicted=None)
    read(log, got)
    assert (len(got.losses), got.counted, got.tokens_per_s) == (steps, counted, tokens)
    assert got.first_alone_s == (4 if steps else None)
