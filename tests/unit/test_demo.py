"""The demo: its config, and a report of what its stages leave."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from checkpoints_tools.try_export import samples
from megadual.config import load_config, to_yaml
from megadual.demo import pictures
from megadual.demo.__main__ import SHARDS, stages
from megadual.demo.report import write_report
from megadual.demo.scenes import SHARDS as SCENES_SHARDS
from megadual.demo.scenes import model_stages, shared_stages
from megadual.demo.stage import Stage, run_stages
from megadual.synthetic.corpus import make_corpus
from megadual.testing.models import sized_run, write_export
from megadual.train.config import PretrainConfig

SAID = [  # of two images: kind, question, answer, said
    ("a.png", "yes_no", "Is there a cat?", "yes", "yes"),
    ("a.png", "count", "How many cats are there?", "two", "three"),
    ("b.png", "yes_no", "Is there a <dog>?", "yes", "no"),
    ("b.png", "yes_no", "Is there an owl?", "no", "no"),
]

SEEN = {"all": {"right": 0.9, "of": 4}}
DESCRIBED = dict.fromkeys(("kind", "count", "ground", "place", "size", "all"), {"right": 0.75, "of": 4})
BESIDE = {"chance": {"all": {"right": 0.125, "of": 4}}, "ceiling": {"originals": SEEN, "reconstructions": {}}}
SCORES = {"describe": DESCRIBED | BESIDE}


@pytest.fixture
def run_folder(tmp_path):
    """What the stages leave, made up."""
    losses = {"loss_text": 2.0, "loss_semantic": 3.0, "depth_semantic": [3.0, 3.0]}
    answers = [
        {"file": file, "kind": kind, "question": question, "answer": answer, "said": said, "right": answer == said}
        for file, kind, question, answer, said in SAID
    ]
    manifest = {"samples": 5, "documents": 4, "quarantined": 1, "shards": ["x"]}
    files = {
        "tokenizer/eval/report.json": {"psnr": 20.0, "about": "left out"},
        "verify.json": {"max_abs_logit_diff": 1e-6, "tensors_compared": 3},
        "shards/pairs/manifest.json": manifest,
        "shards/edits/manifest.json": manifest,
        "pretrain/metrics.jsonl": {"step": 1, "fill": 0.9, "tokens_per_s": 10.0, **losses},
        "use/descriptions.json": [{"file": "a.png", "caption": "a cat", "description": "a dog"}],
        "use/drawings.json": [{"file": "b.png", "caption": "an owl"}],
        "use/answers.json": answers,
        "scenes/scenes.json": {"scores": SCORES, "summary": {"described": 0.75}},
        "use/edits.json": [{"instruction": "remove the cat", "source": "a.png", "drawn": "b.png", "true": "a.png"}],
    }
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    run = sized_run("model.dualtoken=d", "model.text_tokenizer=t", "data.sets=[s]", "run.dir=r")
    (tmp_path / "pretrain/config.yaml").write_text(to_yaml(run))
    for name in ("use/a.png", "use/b.png", "tokenizer/eval/reconstructions-00.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def test_report_has_the_scores_beside_chance_and_ceiling(run_folder):
    page = write_report(run_folder, {"corpus": 1.0})
    report = json.loads((run_folder / "report.json").read_text())
    assert list(report["tokenize"]) == ["edits", "pairs"]
    assert report["use"]["answered"] == 4 and report["scenes"] == {"described": 0.75}
    html = page.read_text()
    shares = re.findall(r'<td class="n">([^<]+)</td>', html[html.index("<td>all</td>") :])
    assert shares[:5] == ["75.0 %", "12.5 %", "–", "90.0 %", "4"]
    assert "higher is better" in html
    assert "Is there a &lt;dog&gt;?" in html and "remove the cat" in html
    assert html.count("✗") == 2 and html.count("✓") == 2
    assert html.count("data:image/png") == 3 + 1 + 1 + 2 + 3  # curves and codes, described, drawn, asked about, edited


@pytest.mark.parametrize(
    "config, plan, shards",
    [
        ("tiny.yaml", stages([]), SHARDS),
        ("scenes/llm.yaml", [*shared_stages(1), *model_stages(Path("run"), [])], SCENES_SHARDS),
    ],
)
def test_every_set_that_is_trained_on_is_made(config, plan, shards):
    run = load_config(PretrainConfig, Path(__file__).parents[2] / "pretrain/configs" / config)
    made = {str(stage.product.parent) for stage in plan if stage.product.is_relative_to(shards)}
    assert {each.path for each in run.data.sets} == made


def code(folder: Path, name: str, script: str = "") -> Stage:
    """A stage that notes its name in `folder`/ran, runs the script and then makes its product."""
    product = folder / name
    note = f"open({str(folder / 'ran')!r}, 'a').write({name + ' '!r})"
    return Stage(name, "", shlex.join(["-c", f"{note}\n{script}\nopen({str(product)!r}, 'w')"]), product)


def test_stages_run_once_until_they_or_one_before_them_changes(tmp_path):
    def run(*plan: Stage) -> str:
        (tmp_path / "ran").unlink(missing_ok=True)
        run_stages(list(plan), tmp_path)
        return (tmp_path / "ran").read_text() if (tmp_path / "ran").exists() else ""

    shared, one, other = (code(tmp_path, name) for name in ("shared", "one", "other"))
    assert run(shared, one) == "shared one "
    assert run(shared, other) == "other "
    assert run(shared, one) == "" == run(shared, other)
    assert run(code(tmp_path, "shared", "1 + 1"), one) == "shared one "
    assert run(code(tmp_path, "shared", "1 + 1"), other) == "other "
    one.product.unlink()
    assert run(code(tmp_path, "shared", "1 + 1"), one) == "one "


def test_a_failed_stage_ends_the_run_with_its_code(tmp_path):
    with pytest.raises(SystemExit, match="3"):
        run_stages([code(tmp_path, "a"), code(tmp_path, "b", "raise SystemExit(3)"), code(tmp_path, "c")], tmp_path)
    assert (tmp_path / "ran").read_text() == "a b "


def test_stages_stop_in_time_and_go_on(tmp_path):
    # saves at SIGTERM, as trainings do, and needs no time once it has
    script = f"""
import pathlib, signal, sys, time
saved = pathlib.Path({str(tmp_path / "saved")!r})
signal.signal(signal.SIGTERM, lambda *_: (saved.touch(), sys.exit(75)))
saved.exists() or time.sleep(60)
"""
    plan = [code(tmp_path, "a"), code(tmp_path, "b", script), code(tmp_path, "c")]
    with pytest.raises(SystemExit, match="75"):
        run_stages(plan, tmp_path, stop_after=1.5)
    stopped = json.loads((tmp_path / "stages.json").read_text())
    seconds = run_stages(plan, tmp_path, stop_after=60)
    assert (tmp_path / "ran").read_text() == "a b b c "
    assert seconds["b"] >= stopped["b"]["seconds"] > 0.5


def test_what_goes_on_does_so_from_the_same_command_alone(tmp_path):
    def plan(first: str, script: str) -> list[Stage]:
        note = f"from pathlib import Path; at = Path({str(tmp_path / 'run')!r}); at.mkdir(exist_ok=True)\n"
        train = code(tmp_path, "b", f"{note}(at / 'steps').open('a').write('x')\n{script}")
        return [code(tmp_path, "a", first), dataclasses.replace(train, resumes=tmp_path / "run")]

    steps = tmp_path / "run/steps"
    fails = "import sys; sys.exit(1)"
    (tmp_path / "run").mkdir()
    steps.write_text("own ")  # not of this plan: nobody asked for its removal
    for _ in range(2):
        with pytest.raises(SystemExit, match="1"):
            run_stages(plan("", fails), tmp_path)
    assert steps.read_text() == "own xx"
    run_stages(plan("", ""), tmp_path)
    assert steps.read_text() == "x"
    run_stages(plan("# another", ""), tmp_path)
    assert steps.read_text() == "x"


def test_pictures_show_the_first_held_out_samples(tmp_path, monkeypatch):
    make_corpus(tmp_path / "corpus", train=8, questions=8, edits=8, heldout=7, size=16)
    options = ["--model", str(write_export(tmp_path)), "--corpus", str(tmp_path / "corpus"), "--count", "7"]
    monkeypatch.setattr("sys.argv", ["pictures", *options, "--output", str(tmp_path / "shown")])
    pictures.main()
    sizes = {path.stem: Image.open(path).size for path in (tmp_path / "shown").iterdir()}
    assert sorted(sizes) == ["answers", "drawings", "edits", "reconstructions"]
    assert sizes["edits"][1] > sizes["answers"][1] > sizes["drawings"][1]  # two rows of pairs; of pictures, more text
    _, first, _ = next(samples("", f"{tmp_path}/corpus/heldout-*.tar", "txt"))
    shown = Image.open(tmp_path / "shown/reconstructions.png").convert("RGB").getpixel((12, 12))
    assert all(abs(a - b) < 24 for a, b in zip(shown, first.convert("RGB").getpixel((1, 1)), strict=True))
