"""The demo's report: report.json for programs, report.html (one file, pictures inside) for people."""

import base64
import io
import json
from itertools import groupby
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from megadual.config import load_config  # noqa: E402
from megadual.engine.topology import topology  # noqa: E402
from megadual.evaluate.scenes_page import score_table  # noqa: E402
from megadual.run.step_log import METRICS, read_metrics  # noqa: E402
from megadual.train.config import PretrainConfig  # noqa: E402

LOSS = "loss_"  # of text or a stream: that and its name


def _read(path: Path):
    return json.loads(path.read_text())


def collect(run_folder: Path, seconds: dict[str, float]) -> dict:
    """Every stage's figures, from the files that the stages left."""
    evaluation, verified = _read(run_folder / "tokenizer/eval/report.json"), _read(run_folder / "verify.json")
    manifests = {path.parent.name: _read(path) for path in sorted((run_folder / "shards").glob("*/manifest.json"))}
    steps, _ = read_metrics(run_folder / "pretrain" / METRICS)
    run = load_config(PretrainConfig, run_folder / "pretrain/config.yaml")
    layout = topology(run, run.run.ranks or run.parallel.tensor * run.parallel.pipeline)
    losses = {
        name: {"first": value, "last": steps[-1][name]} for name, value in steps[0].items() if name.startswith(LOSS)
    }
    return {
        "stages": seconds,
        "tokenizer": {name: value for name, value in evaluation.items() if isinstance(value, (int, float))},
        "tokenize": {
            name: {
                "samples_in": manifest["samples"],
                "written": manifest["documents"],
                "quarantined": manifest["quarantined"],
                "shards": len(manifest["shards"]),
            }
            for name, manifest in manifests.items()
        },
        "pretrain": {
            "engine": run.engine,
            "layout": layout.describe(run),
            "steps": len(steps),
            **losses,
            "fill": sum(step["fill"] for step in steps) / len(steps),
            "tokens_per_s": sorted(step["tokens_per_s"] for step in steps)[len(steps) // 2],
        },
        "convert": {name: verified[name] for name in ("max_abs_logit_diff", "tensors_compared")},
        "use": {
            "described": len(_read(run_folder / "use/descriptions.json")),
            "drawn": len(_read(run_folder / "use/drawings.json")),
            "edited": len(_read(run_folder / "use/edits.json")),
            "answered": len(_read(run_folder / "use/answers.json")),
        },
        "scenes": _read(run_folder / "scenes/scenes.json")["summary"],
    }


def _png(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _loss_curves(steps: list[dict]) -> str:
    names = [name.removeprefix(LOSS) for name in steps[0] if name.startswith(LOSS)]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), layout="constrained")
    for axis, stream in zip(axes, names, strict=True):
        axis.plot([s["step"] for s in steps], [s[f"loss_{stream}"] for s in steps], label="mean", color="black")
        depths = steps[0].get(f"depth_{stream}", [])
        for depth in range(len(depths)):
            values = [s[f"depth_{stream}"][depth] for s in steps]
            axis.plot([s["step"] for s in steps], values, linewidth=0.6, label=f"depth {depth}")
        axis.set(title=f"{stream} stream", xlabel="step", ylabel="cross-entropy")
        if depths:
            axis.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(run_folder: Path, seconds: dict[str, float]) -> Path:
    """Write report.json and report.html into the demo's run folder; returns the page's path."""
    report = collect(run_folder, seconds)
    (run_folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    use, evaluation = run_folder / "use", run_folder / "tokenizer/eval"
    pictures = sorted(evaluation.glob("reconstructions-*.png"))
    page = TEMPLATE.render(
        report=report,
        scores=score_table(_read(run_folder / "scenes/scenes.json")["scores"]),
        total=sum(seconds.values()),
        curves=_loss_curves(read_metrics(run_folder / "pretrain" / METRICS)[0]),
        worst=_png(pictures[0]),
        middle=_png(pictures[len(pictures) // 2]),
        descriptions=[entry | {"image": _png(use / entry["file"])} for entry in _read(use / "descriptions.json")],
        drawings=[entry | {"image": _png(use / entry["file"])} for entry in _read(use / "drawings.json")],
        conversations=[
            {"image": _png(use / file), "asked": list(asked)}
            for file, asked in groupby(_read(use / "answers.json"), key=lambda entry: entry["file"])
        ],
        edits=[
            entry | {name: _png(use / entry[name]) for name in ("source", "drawn", "true")}
            for entry in _read(use / "edits.json")
        ],
    )
    path = run_folder / "report.html"
    path.write_text(page)
    return path


TEMPLATE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>MegaDual demo</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; color: #222 }
 h2 { margin-top: 2em; border-bottom: 1px solid #ddd }
 table { border-collapse: collapse } td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top }
 td.cards { display: table-cell } td.n { text-align: right; font-variant-numeric: tabular-nums }
 .cards { display: flex; flex-wrap: wrap; gap: 16px } .cards figure { width: 200px; margin: 0 }
 .cards img { width: 160px; image-rendering: pixelated; border: 1px solid #ccc } figcaption { font-size: 13px }
 .wide { max-width: 100%; image-rendering: pixelated } .soft { color: #666 }
</style>
<h1>MegaDual demo</h1>
<p>From drawings to a model that describes, draws, answers and edits, on this machine's CPU in
{{ "%.0f"|format(total) }} s.
Everything is tiny; <code>make scenes</code> is the same way at a size for one GPU.</p>

<h2>Scores on held-out scenes</h2>
{{ scores }}
<p><a href="scenes/scenes.html">The pictures and texts that were scored</a>, each marked as right or wrong.</p>

<h2>Stages</h2>
<table>{% for name, seconds in report.stages.items() %}
<tr><td>{{ name }}</td><td class="n">{{ "%.1f"|format(seconds) }} s</td></tr>{% endfor %}
</table>

<h2>Tokenizer</h2>
<table>{% for name, value in report.tokenizer.items() %}
<tr><td>{{ name }}</td><td class="n">{{ "%.4g"|format(value) }}</td></tr>{% endfor %}
</table>
<p>Held-out originals, each beside its reconstruction from codes: the middle of the range.</p>
<img class="wide" src="{{ middle }}" alt="reconstructions">
<p>The worst ones:</p>
<img class="wide" src="{{ worst }}" alt="worst reconstructions">

<h2>Pre-tokenization</h2>
<table><tr><th>set</th><th>samples in</th><th>documents written</th><th>quarantined</th><th>shards</th></tr>
{% for name, set in report.tokenize.items() %}
<tr><td>{{ name }}</td><td class="n">{{ set.samples_in }}</td><td class="n">{{ set.written }}</td>
<td class="n">{{ set.quarantined }}</td><td class="n">{{ set.shards }}</td></tr>{% endfor %}
</table>
<p>What is quarantined is listed, with the reason, beside the shards.</p>

<h2>Pretraining</h2>
<p>{{ report.pretrain.engine }}, {{ report.pretrain.layout }}, {{ report.pretrain.steps }} steps,
{{ "%.0f"|format(report.pretrain.tokens_per_s) }} positions/s, fill {{ "%.3f"|format(report.pretrain.fill) }}.</p>
<img class="wide" src="{{ curves }}" alt="loss curves">
<p>Exported model against the trainer's: largest logit difference
{{ "%.2g"|format(report.convert.max_abs_logit_diff) }} over {{ report.convert.tensors_compared }} equal tensors.</p>

<h2>Drawn from held-out captions</h2>
<div class="cards">{% for entry in drawings %}
<figure><img src="{{ entry.image }}" alt="drawing"><figcaption>{{ entry.caption }}</figcaption></figure>{% endfor %}
</div>

<h2>Held-out images described</h2>
<div class="cards">{% for entry in descriptions %}
<figure><img src="{{ entry.image }}" alt="held-out image"><figcaption>{{ entry.description }}
<br><span class="soft">its caption: {{ entry.caption }}</span></figcaption></figure>{% endfor %}
</div>

<h2>Held-out images asked about</h2>
<div class="cards">{% for entry in conversations %}
<figure><img src="{{ entry.image }}" alt="image asked about"><figcaption>{% for turn in entry.asked %}
{{ turn.question }} <b>{{ turn.said }}</b> {{ "✓" if turn.right else "✗" }}
{% if not turn.right %}<span class="soft">{{ turn.answer }}</span>{% endif %}<br>{% endfor %}
</figcaption></figure>{% endfor %}
</div>

<h2>Held-out edits</h2>
<table><tr><th>source</th><th>instruction</th><th>drawn</th><th>true result</th></tr>
{% for entry in edits %}<tr>
<td class="cards"><img src="{{ entry.source }}" alt="source"></td><td>{{ entry.instruction }}</td>
<td class="cards"><img src="{{ entry.drawn }}" alt="drawn"></td>
<td class="cards"><img src="{{ entry.true }}" alt="true result"></td></tr>{% endfor %}
</table>
</html>
""")
