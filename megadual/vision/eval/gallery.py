"""Reconstructions to look at, the worst first: grids as PNG files, and an HTML page with each pair's figures."""

import base64
import heapq
import io
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from torch import Tensor

from ..pictures import comparison_grid
from ..tokenizer import to_image
from .measures import Seen
from .words import rows

PAIRS_PER_GRID = 64


@dataclass
class Pair:
    """original, reconstruction: (3, h, w) in [-1, 1], half precision; values: psnr and others, by name."""

    name: str
    caption: str
    original: Tensor
    reconstruction: Tensor
    values: dict[str, float]


class Gallery:
    """The `size` pairs of lowest PSNR among all that were seen; holds no others."""

    def __init__(self, size: int):
        self.size, self.seen = size, 0
        self.heap: list[tuple[float, int, Pair]] = []  # the best of those kept stands first and goes first

    def update(self, seen: Seen, values: dict[str, list[float]]) -> None:
        originals, reconstructions = (x.half().cpu() for x in (seen.samples.images, seen.reconstructions))
        for i, name in enumerate(seen.samples.names):
            figures = {key: batch[i] for key, batch in values.items()}
            pair = Pair(name, seen.samples.captions[i], originals[i], reconstructions[i], figures)
            self.seen += 1
            heapq.heappush(self.heap, (-figures["psnr"], self.seen, pair))
            if len(self.heap) > self.size:
                heapq.heappop(self.heap)

    def worst_first(self) -> list[Pair]:
        return [pair for _, _, pair in sorted(self.heap, reverse=True)]

    def write(self, folder: Path, report: dict) -> None:
        """`folder`/reconstructions-NN.png, 64 pairs each, and `folder`/report.html."""
        pairs = self.worst_first()
        for old in folder.glob("reconstructions-*.png"):
            old.unlink()
        grids = range(0, len(pairs), PAIRS_PER_GRID)
        digits = len(str(len(grids) - 1))
        for number, start in enumerate(grids):
            some = pairs[start : start + PAIRS_PER_GRID]
            images = (torch.stack([getattr(p, name).float() for p in some]) for name in ("original", "reconstruction"))
            comparison_grid(*images).save(folder / f"reconstructions-{number:0{digits}d}.png")
        figures = {name: value for name, value in report.items() if isinstance(value, int | float)}
        cards = [(pair, _webp(pair.original), _webp(pair.reconstruction)) for pair in pairs]
        page = PAGE.render(report=report, figures=rows(figures), cards=cards, seen=self.seen)
        (folder / "report.html").write_text(page)


def _webp(image: Tensor) -> str:
    file = io.BytesIO()
    to_image(image.float()).save(file, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>DualToken on held-out images</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
 td { padding: 2px 14px 2px 0; vertical-align: top } td.n { text-align: right; font-variant-numeric: tabular-nums }
 .cards { display: flex; flex-wrap: wrap; gap: 14px } figure { margin: 0; width: 262px } figcaption { font-size: 12px }
 figure img { width: 128px; image-rendering: pixelated } .soft { color: #666 } td.soft { font-size: 13px }
</style>
<h1>DualToken on held-out images</h1>
<table>{% for row in figures %}
<tr><td>{{ row.words }}</td><td class="n">{{ row.value }}</td><td class="soft">{{ row.better }}</td>\
<td class="soft">{{ row.name }}</td></tr>{% endfor %}
</table>
<h2>What they mean</h2>
<table>{% for name, text in report.definitions.items() %}
<tr><td>{{ name }}</td><td class="soft">{{ text }}</td></tr>{% endfor %}{% for name, text in report.left_out.items() %}
<tr><td>{{ name }}, left out</td><td class="soft">{{ text }}</td></tr>{% endfor %}
</table>
<h2>Reconstructions, the worst first</h2>
<p>{{ cards|length }} of {{ seen }} images, those of the lowest PSNR; the original stands at the left.
PSNR in dB and SSIM: higher is better; LPIPS: lower is.</p>
<div class="cards">{% for pair, original, reconstruction in cards %}
<figure><img src="{{ original }}" alt="original"> <img src="{{ reconstruction }}" alt="reconstruction">
<figcaption>{% for name, value in pair.values.items() %}{{ name }} {{ "%.3g"|format(value) }} {% endfor %}
<br>{{ pair.name }}<br><span class="soft">{{ pair.caption }}</span></figcaption></figure>{% endfor %}
</div>
</html>
""")
