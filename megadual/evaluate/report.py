"""All scores below a folder on one page, each beside the paper's, with what differs.

`python -m megadual.evaluate report DIR` writes DIR/scores.json and DIR/scores.html; with `--model` the exported
folder's README.md gets them as a section, which a later report replaces.
"""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

import jinja2

from megadual.errors import UserError
from megadual.evaluate.paper import DIFFERS, ROWS, SOURCE
from megadual.evaluate.record import now, write_json
from megadual.evaluate.results import Score, find_scores

BEGIN, END = "<!-- scores -->", "<!-- end of scores -->"


def gather(folder: Path) -> dict:
    """The report: every score with the paper's rows, how it was taken, and the record of its pictures."""
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder; give the one that holds the results")
    scores, unread = find_scores(folder)
    records = [json.loads(path.read_text()) | {"file": str(path)} for path in sorted(folder.rglob("record.json"))]
    entries = []
    for score in scores:
        entry = asdict(score)
        entry["paper"] = ROWS.get((score.benchmark, score.metric), {})
        drawn = _record_of(score, records)
        notes = [DIFFERS.get(score.benchmark, "not in the paper"), score.differs, _sampled(drawn) if drawn else ""]
        entry["differs"] = "; ".join(filter(None, notes))
        entry["drawn"] = drawn and drawn["file"]
        entries.append(entry)
    return {"paper": SOURCE, "scores": entries, "unread": unread, "time": now()}


def _record_of(score: Score, records: list[dict]) -> dict | None:
    """The record of the pictures that were scored: the benchmark's one, of several that nearest to the result."""
    of = [record for record in records if record.get("benchmark") == score.benchmark]
    if len(of) < 2:
        return of[0] if of else None
    above = [record for record in of if Path(record["file"]).parent in Path(score.file).parents]
    return max(above, key=lambda record: len(record["file"]), default=None)


def _sampled(record: dict) -> str:
    sampling, count = record["sampling"], record["prompts"]["count"]
    drawn = "" if record["complete"] else " (not all drawn)"
    return (
        f"drawn with guidance {sampling['cfg_scale']}, temperature {sampling['temperature']}, "
        f"top-k {sampling['top_k']}, top-p {sampling['top_p']}: "
        f"{record['images_per_prompt']} of each of {count} prompts{drawn}"
    )


def shown(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def card_section(report: dict) -> str:
    """The scores as a section of a model card."""
    lines = ["## Scores", "", f"Beside those of the DualToken paper ({report['paper']}).", ""]
    lines += ["| benchmark | score | the paper's | how |", "| --- | --- | --- | --- |"]
    for score in report["scores"]:
        name = f"{score['benchmark']} {score['metric']}".strip()
        rows = ", ".join(f"{row}: {value:g}" for row, value in score["paper"].items())
        how = re.sub(r"\s+", " ", score["differs"]).replace("|", "/")
        lines.append(f"| {name} | {shown(score['value'])} | {rows or '–'} | {how} |")
    return "\n".join([BEGIN, *lines, END]) + "\n"


def add_to_card(model: Path, report: dict) -> None:
    """Put the section into the exported folder's README.md, in the place of an older one."""
    card = model / "README.md"
    if not (model / "config.json").is_file() or not card.is_file():
        raise UserError(f"--model '{model}' is not an exported folder with a README.md")
    text, section = card.read_text(), card_section(report)
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        text = before + section + rest.partition(END)[2].removeprefix("\n")
    else:
        text = text.rstrip("\n") + "\n\n" + section
    partial = card.with_name(".partial-README.md")
    partial.write_text(text)
    partial.replace(card)


def write_report(folder: Path) -> dict:
    report = gather(folder)
    write_json(folder / "scores.json", report)
    (folder / "scores.html").write_text(PAGE.render(report=report, shown=shown))
    return report


PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Scores</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
 table { border-collapse: collapse } td, th { padding: 4px 14px 4px 0; text-align: left; vertical-align: top }
 td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
 .soft { color: #666; font-size: 13px }
</style>
<h1>Scores</h1>
<p>Each beside the rows of the DualToken paper ({{ report.paper }}) that report it, with what is known to differ.</p>
<table><tr><th>benchmark</th><th></th><th>score</th><th>items</th><th>the paper's</th><th>how it was taken</th></tr>
{% for score in report.scores %}<tr><td>{{ score.benchmark }}</td><td>{{ score.metric }}
{% for name, value in score.details.items() %}<br><span class="soft">{{ name }}</span>{% endfor %}</td>
<td class="n"><b>{{ shown(score.value) }}</b>
{% for name, value in score.details.items() %}<br><span class="soft">{{ shown(value) }}</span>{% endfor %}</td>
<td class="n">{{ score.of or "" }}</td>
<td>{% for row, value in score.paper.items() %}{{ row }}: {{ value }}<br>{% endfor %}</td>
<td class="soft">{{ score.differs }}<br>{{ score.file }}</td></tr>
{% endfor %}</table>
{% if report.unread %}<h2>Could not be read</h2><table>{% for file, why in report.unread.items() %}
<tr><td>{{ file }}</td><td class="soft">{{ why }}</td></tr>{% endfor %}</table>{% endif %}
</html>
""")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder with the result files, at any depth")
    parser.add_argument("--model", type=Path, help="exported folder whose README.md gets the scores")


def run(args: argparse.Namespace) -> None:
    report = write_report(args.folder)
    if args.model:
        add_to_card(args.model, report)
    for file, why in report["unread"].items():
        print(f"could not be read: {file}: {why}")
    print(f"{len(report['scores'])} scores: {args.folder / 'scores.html'}")
