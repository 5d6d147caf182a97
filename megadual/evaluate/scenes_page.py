"""The page of a model's scores on scenes, with pictures."""

import base64
import io

import jinja2
import markupsafe
from PIL import Image

from megadual.evaluate.scene_scores import table

SHOWN = 24  # pictures of each task
TITLES = {"describe": "Describing", "ask": "Questions", "draw": "Drawing", "edit": "Edits"}
MEASURE = (
    "The share of held-out scenes, in %, of which what the line names is right: higher is better. Pictures are judged "
    "by a detector that was trained on scenes. What it makes of the true pictures, and of the tokenizer's "
    "reconstructions of them, is the ceiling of what can be expected. Chance is what the caption or picture of another "
    "scene gets, the commonest answer to a kind of question, a picture that was not edited."
)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    Image.Image.save(image, buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(report: dict, cards: dict[str, list[dict]]) -> str:
    shown = {
        task: [card | {"images": [_png(image) for image in card["images"]]} for card in some[:SHOWN]]
        for task, some in cards.items()
    }
    return PAGE.render(report=report, cards=shown, titles=TITLES, table=score_table(report["scores"]))


def score_table(scores: dict) -> markupsafe.Markup:
    """What is measured, in words, and the table of all scores, as HTML."""
    return markupsafe.Markup(TABLE.render(rows=list(table(scores)), titles=TITLES, measure=MEASURE, percent=percent))


TABLE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
<p>{{ measure }}</p>
<table><tr><th></th><th></th><th>model</th><th>chance</th><th>reconstructions</th><th>true pictures</th><th>of</th>
<th></th></tr>{% for row in rows %}<tr{% if row.whole %} style="font-weight: bold"{% endif %}>
<td>{{ titles[row.task] if loop.first or loop.previtem.task != row.task else "" }}</td><td>{{ row.name }}</td>
{% for share in (row.right, row.chance, row.reconstructions, row.originals) %}<td class="n">{{ percent(share) }}</td>
{% endfor %}<td class="n">{{ row.of }}</td><td class="soft">{{ row.about }}</td></tr>
{% endfor %}</table>
""")

PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Scenes</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; color: #222 }
 h2 { margin-top: 2em; border-bottom: 1px solid #ddd } table { border-collapse: collapse }
 td, th { padding: 2px 14px 2px 0; text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums }
 .cards { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 1em } figure { width: 168px; margin: 0 }
 figure.two { width: 300px } figure img { width: 144px; image-rendering: pixelated; border: 1px solid #ccc }
 figcaption { font-size: 13px } .soft { color: #666 } .no { color: #b00 } .yes { color: #080 }
</style>
{% macro shown(task) %}<div class="cards">{% for card in cards[task] %}
<figure{% if card.images|length > 1 %} class="two"{% endif %}>
{% for image in card.images %}<img src="{{ image }}" alt=""> {% endfor %}
<figcaption><b class="{{ 'yes' if card.right else 'no' }}">{{ "✓" if card.right else "✗" }}</b> {{ card.text }}
{% if card.true and not card.right %}<br><span class="soft">{{ card.true }}</span>{% endif %}
</figcaption></figure>{% endfor %}</div>{% endmacro %}
<h1>Scenes</h1>
<p>{{ report.model.path }}, {{ report.scenes }} held-out scenes of each task, seed {{ report.seed }}; guidance
{{ report.sampling.cfg_scale }}, temperature {{ report.sampling.temperature }}.</p>
{{ table }}
{% for task, title in titles.items() if task in cards %}<h2>{{ title }}</h2>
{{ shown(task) }}{% endfor %}
{% if report.left_out %}<h2>Left out</h2><table>{% for name, why in report.left_out.items() %}
<tr><td>{{ name }}</td><td class="soft">{{ why }}</td></tr>{% endfor %}</table>{% endif %}
</html>
""")
