"""The page of a model's scores on scenes, with pictures."""

import base64
import io

import jinja2
from PIL import Image

SHOWN = 24  # pictures of each task


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
    return PAGE.render(report=report, cards=shown, percent=percent)


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
{% set scores = report.scores %}
{% if "draw" in scores %}<h2>Drawing</h2>
{% set truth = scores.draw.ceiling.originals %}{% set back = scores.draw.ceiling.reconstructions %}
<table><tr><th></th><th>drawn</th><th>reconstructions</th><th>true pictures</th><th>scenes</th><th></th></tr>
{% for axis, value in scores.draw.axes.items() %}<tr><td>{{ axis }}</td><td class="n">{{ percent(value.right) }}</td>
<td class="n">{{ percent(back.axes[axis].right) }}</td><td class="n">{{ percent(truth.axes[axis].right) }}</td>
<td class="n">{{ value.of }}</td><td class="soft">{{ report.definitions[axis] }}</td></tr>{% endfor %}
<tr><td><b>overall</b></td><td class="n"><b>{{ percent(scores.draw.overall) }}</b></td>
<td class="n">{{ percent(back.overall) }}</td><td class="n">{{ percent(truth.overall) }}</td><td></td>
<td class="soft">the mean of the axes</td></tr>
<tr><td>all right</td><td class="n">{{ percent(scores.draw.all_right) }}</td>
<td class="n">{{ percent(back.all_right) }}</td>
<td class="n">{{ percent(truth.all_right) }}</td><td class="n">{{ report.scenes }}</td>
<td class="soft">everything that was asked for, and nothing else</td></tr></table>
<p>By the detector; what it makes of the true pictures, and of their reconstructions by the tokenizer, bounds what
can be expected of drawings.</p>
{{ shown("draw") }}{% endif %}
{% if "describe" in scores %}<h2>Describing</h2>
<table><tr><th></th><th>right</th><th>scenes</th></tr>{% for name, value in scores.describe.items() %}
<tr><td>{{ name }}</td><td class="n">{{ percent(value.right) }}</td><td class="n">{{ value.of }}</td></tr>{% endfor %}
</table><p class="soft">all: kind, count, ground and place.</p>{{ shown("describe") }}{% endif %}
{% if "ask" in scores %}<h2>Questions</h2>
<table><tr><th></th><th>right</th><th>the commonest answer</th><th>questions</th></tr>
{% for kind, value in scores.ask.items() %}<tr><td>{{ kind }}</td><td class="n">{{ percent(value.right) }}</td>
<td class="n">{{ percent(value.blind) }}</td><td class="n">{{ value.of }}</td></tr>{% endfor %}
</table>{{ shown("ask") }}{% endif %}
{% if "edit" in scores %}<h2>Edits</h2>
<table><tr><th></th><th>the change</th><th>the rest as it was</th><th>both</th><th>both, reconstructions</th>
<th>both, true pictures</th><th>edits</th></tr>
{% for task, value in scores.edit.items() if task != "ceiling" %}<tr><td>{{ task }}</td>
<td class="n">{{ percent(value.change) }}</td><td class="n">{{ percent(value.rest) }}</td>
<td class="n">{{ percent(value["all"]) }}</td>
<td class="n">{{ percent(scores.edit.ceiling.reconstructions[task]["all"]) }}</td>
<td class="n">{{ percent(scores.edit.ceiling.originals[task]["all"]) }}</td>
<td class="n">{{ value.of }}</td></tr>{% endfor %}
</table>{{ shown("edit") }}{% endif %}
{% if report.left_out %}<h2>Left out</h2><table>{% for name, why in report.left_out.items() %}
<tr><td>{{ name }}</td><td class="soft">{{ why }}</td></tr>{% endfor %}</table>{% endif %}
</html>
""")
