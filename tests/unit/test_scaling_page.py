"""docs/scaling.md says what the code predicts."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_code(monkeypatch):
    """The measured table whole, and of the others a line."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import plan

    page, measured = (ROOT / "docs/scaling.md").read_text(), plan.rates_of(plan.GPU)
    assert plan.renewed(page, {"measured": plan.beside_measured(measured)}) == page
    monkeypatch.setattr(plan, "MODELS", ("7b",))
    monkeypatch.setattr(plan, "BATCHES", {64: 2**21})
    *_, line = plan.headline(measured).splitlines()
    assert line in page
    assert set(re.findall("<!-- end of (.*) -->", page)) == {"measured", "predicted", "curve", "fixed batch"}
