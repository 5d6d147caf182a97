"""The tables and the picture of docs/scaling.md: what the plan predicts on 8 to 4,096 GPUs, and how far it is off.

python benchmarks/plan.py [--page docs/scaling.md]

Arithmetic alone (megadual/engine/predict.py, rates.yaml), which needs no GPU, data or tokenizers, for the layouts that
parallel.layout=auto picks. The tables go where the page has their names, the picture to pictures/scaling.svg beside it.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tokenizers that are not here are assumed

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from scaling import LAYOUTS, ROOT, config_of, overrides_of

from megadual.config import load_config
from megadual.engine.choose import Candidate, Search, search
from megadual.engine.predict import Rates, predict, rates_of
from megadual.errors import UserError, command
from megadual.train import assume, setup
from megadual.train.config import PLANNED, PretrainConfig

GPU, DUALTOKEN, TOKENS = "H100", "siglip2-so400m-384-rvq8", 10**12
MODELS = ("3b", "7b", "14b", "32b")
BATCHES = {8: 2**21, 64: 2**21, 512: 2**22, 4096: 2**24}  # positions a step, by GPUs
CURVE = [2**i for i in range(3, 13)]  # GPUs
ROWS_A_GPU = 8  # of the curve
NATURAL = ("computing", "optimizer")  # parts of a step that are no loss

# Tokens/s a GPU, MFU, GiB of rank 0 and rows a step, H100s (docs/log.md), by name in benchmarks/scaling.py: what the
# rates were fitted to, 2026-11-26 (ZeRO-1 two days later), and what was measured since on other hosts. The host's own
# rates are from both TP2+SP.
FITTED = {
    "one GPU": (44_148, 0.516, 63.0, 32), "DP2": (42_647, 0.500, 46.7, 32), "PP2": (35_719, 0.429, 30.7, 32),
    "TP2+SP": (36_101, 0.426, 39.7, 32), "ZeRO-1 DP2": (38_371, 0.454, 46.7, 32),
    "ZeRO-3 DP2": (22_107, 0.255, 42.4, 32), "3B DP2": (20_993, 0.483, 68.6, 32),
    "7B TP2+SP PP2": (9_556, 0.434, 46.8, 32),
}  # fmt: skip
SINCE = {
    "one GPU": (43_208, 0.509, 63.0, 32), "DP4": (41_288, 0.485, 38.6, 32), "PP2, ahead": (36_819, 0.438, 33.3, 32),
    "TP2+SP": (29_004, 0.344, 39.7, 32), "TP2+SP, two rows at a time": (40_303, 0.476, 44.4, 32),
    "7B TP2+SP PP2, ahead, two rows at a time": (10_204, 0.465, 67.7, 64),
    "CP2, rows of 32,768": (44_650, 0.533, 64.7, 32),
}  # fmt: skip


def inputs_of(config: Path, overrides: list[str]) -> tuple[PretrainConfig, setup.Inputs]:
    run = load_config(PretrainConfig, config, [*overrides, f"model.dualtoken={DUALTOKEN}"], PLANNED)
    return run, assume.read_or_assume(run)


def planned(model: str, gpus: int, batch: int, measured: tuple[str, Rates]) -> Search:
    run, inputs = inputs_of(ROOT / f"pretrain/configs/{model}.yaml", [f"train.global_batch_tokens={batch}"])
    return search(run, gpus, inputs.vocabulary, inputs.traffic, measured)


def beside_measured(measured: tuple[str, Rates]) -> str:
    """What was measured, and the plan's errors."""
    lines = [
        "| layout | GPUs | measured, tokens/s a GPU | predicted | error | MFU | predicted | GiB, rank 0 | predicted |",
        "| --- " * 9 + "|",
    ]
    told = []
    for title, figures in ("the rates were fitted to", FITTED), ("measured since", SINCE):
        errors = []
        lines.append(f"| *{title}* " + "| " * 8 + "|")
        for name, (tokens, mfu, gib, rows) in figures.items():
            gpus = LAYOUTS[name][0]
            args = argparse.Namespace(micro_batches=rows // 4, gpus=4, inputs="not-here", steps=14, set=[])
            own = [each for each in overrides_of(name, args) if not each.startswith("model.dualtoken")]
            run, inputs = inputs_of(config_of(name), own)
            layout = setup.settle(run, gpus, inputs)
            run.train.drawn_at_once = run.train.seq_len * run.train.micro_batch_size  # they kept all
            expected = predict(run, layout, inputs.vocabulary, inputs.traffic, measured)
            error = expected.tokens_per_s / tokens - 1
            errors.append(abs(error))
            cells = [
                name, str(gpus), f"{tokens:,}", f"{expected.tokens_per_s:,.0f}", f"{error:+.1%}", f"{mfu:.3f}",
                f"{expected.mfu:.3f}", f"{gib:.1f}", f"{expected.peak_gib:.1f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        told.append(f"of what {title} {sum(errors) / len(errors):.1%}, at most {max(errors):.1%}")
    return "\n".join([*lines, "", f"Mean error {'; '.join(told)}."])


def headline(measured: tuple[str, Rates]) -> str:
    lines = [
        f"| model | GPUs | batch | layout | GiB | s a step | tokens/s a GPU | in all | MFU | days for {TOKENS:.0e} |",
        "| --- " * 10 + "|",
    ]
    for model in MODELS:
        for gpus, batch in BATCHES.items():
            found = planned(model, gpus, batch, measured)
            lines.append(f"| {model.upper()} | {gpus:,} | {batch / 2**20:.0f} Mi | {_figures(found, gpus)} |")
    return "\n".join(lines)


def _figures(found: Search, gpus: int) -> str:
    try:
        best = found.best()
    except UserError:
        least = min(found.candidates, key=lambda each: each.most_gib)
        return f"none fits: {_short(least)} takes {least.most_gib:.0f} GiB |" + " - |" * 5 + " -"
    expected = best.prediction
    whole = expected.tokens_per_s * gpus
    return (
        f"{_short(best)} | {best.most_gib:.0f} | {expected.step_s:.2f} | {expected.tokens_per_s:,.0f} | "
        f"{whole / 1e6:.2f} M | {expected.mfu:.1%} | {TOKENS / whole / 86400:,.1f}"
    )


def _short(candidate: Candidate) -> str:
    parallel, data = candidate.run.parallel, candidate.layout.data
    parts = [f"TP{parallel.tensor}"] if parallel.tensor > 1 else []
    virtual = f"x{parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
    parts += [f"PP{parallel.pipeline}{virtual}"] if parallel.pipeline > 1 else []
    recompute = ", recompute" if candidate.run.train.recompute else ""
    return " ".join([*parts, f"DP{data}"]) + recompute


def fixed_batch(measured: tuple[str, Rates]) -> str:
    """The share of its 8 (32B: 64) GPUs' speed a GPU keeps where the batch does not grow."""
    lines = ["| GPUs | " + " | ".join(model.upper() for model in MODELS) + " |", "| --- " * (len(MODELS) + 1) + "|"]
    rows: dict[int, list[str]] = {gpus: [] for gpus in BATCHES}
    for model in MODELS:
        first = None
        for gpus in BATCHES:
            fitting = planned(model, gpus, 2**21, measured).fitting
            speed = fitting[0].prediction.tokens_per_s if fitting else None
            first = first or speed
            rows[gpus].append(f"{speed / first:.0%} ({_short(fitting[0])})" if speed and first else "none fits")
    return "\n".join([*lines, *(f"| {gpus:,} | {' | '.join(cells)} |" for gpus, cells in rows.items())])


def draw(path: Path, measured: tuple[str, Rates]) -> dict[str, list[Candidate]]:
    """The picture of weak scaling; returns what was picked for each model, by GPUs in CURVE that any layout fits."""
    curves = {}
    for model in MODELS:
        picked = [planned(model, gpus, gpus * ROWS_A_GPU * 4096, measured).fitting for gpus in CURVE]
        curves[model] = [each[0] for each in picked if each]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for model, picked in curves.items():
        fixed = [each[0] for gpus in CURVE[::3] if (each := planned(model, gpus, 2**21, measured).fitting)]
        for line, style, label in ((picked, "o-", model.upper()), (fixed, "--", None)):
            points = [(each.layout.world, 100 * each.prediction.mfu) for each in line]
            left.plot(*zip(*points, strict=True), style, ms=3, label=label, color=f"C{list(curves).index(model)}")
    left.set(xscale="log", xlabel="GPUs", ylabel="MFU, %", ylim=(0, 55))
    left.set_title(f"{ROWS_A_GPU} rows of 4,096 a GPU; dashed: 512 in all", fontsize=10)
    left.legend(loc="lower left")
    picked = curves["7b"]
    parts = [part for part in picked[0].prediction.parts if part not in NATURAL]
    shares = [[100 * each.prediction.parts[part] / each.prediction.step_s for each in picked] for part in parts]
    right.stackplot([each.layout.world for each in picked], shares, labels=parts)
    right.set(xscale="log", xlabel="GPUs", ylabel="% of the step", ylim=(0, 20))
    right.set_title("7B: what of a step is neither computing nor optimizer", fontsize=10)
    right.legend(loc="upper left", fontsize=7)
    for axes in (left, right):
        axes.set_xticks(CURVE[::3], [f"{gpus:,}" for gpus in CURVE[::3]])
        axes.minorticks_off()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "scaling", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return curves


def curve_table(curves: dict[str, list[Candidate]]) -> str:
    heads = [part for part in next(iter(curves.values()))[0].prediction.parts if part not in NATURAL]
    lines = [f"| 7B on | layout | tokens/s a GPU | {' | '.join(heads)} |", "| --- " * (3 + len(heads)) + "|"]
    for each in curves["7b"][::3]:
        expected = each.prediction
        shares = " | ".join(f"{expected.parts[part] / expected.step_s:.1%}" for part in heads)
        lines.append(f"| {each.layout.world:,} | {_short(each)} | {expected.tokens_per_s:,.0f} | {shares} |")
    return "\n".join(lines)


def tables(measured: tuple[str, Rates], curves: dict[str, list[Candidate]]) -> dict[str, str]:
    return {
        "measured": beside_measured(measured),
        "predicted": headline(measured),
        "curve": curve_table(curves),
        "fixed batch": fixed_batch(measured),
    }


def renewed(page: str, tables: dict[str, str]) -> str:
    """The page with each table in the place that is marked with its name."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, opened, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise UserError(f"the page has no place for the table '{name}': {begin.strip()} and {end}")
        page = f"{before}{begin}{table}\n{end}{after}"
    return page


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/scaling.md", help="whose tables are renewed")
    args = parser.parse_args()
    measured = rates_of(GPU)
    curves = draw(args.page.parent / "pictures/scaling.svg", measured)
    args.page.write_text(renewed(args.page.read_text(), tables(measured, curves)))


if __name__ == "__main__":
    main()
