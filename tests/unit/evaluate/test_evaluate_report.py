"""Result files in the scorers' stated formats, gathered; figures worked out by hand."""

import json

import pytest
import torch

from megadual.errors import UserError
from megadual.evaluate.__main__ import main
from megadual.evaluate.report import gather


def lines(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def results(tmp_path):
    """A file of each scorer."""
    folder = tmp_path / "results"
    right = [("single_object", True), ("single_object", True), ("position", False), ("position", True)]
    lines(folder / "geneval/results.jsonl", [
        {"filename": f"{i}.png", "tag": tag, "prompt": "", "correct": correct, "reason": "", "metadata": "{}"}
        for i, (tag, correct) in enumerate([*right, ("position", False), ("position", False)])
    ])  # fmt: skip
    sampling = {"cfg_scale": 5.0, "temperature": 1.0, "top_k": 900, "top_p": 0.96, "seed": 0}
    record = {"benchmark": "geneval", "sampling": sampling, "prompts": {"count": 553}, "images_per_prompt": 4}
    record["complete"] = True
    (folder / "geneval/record.json").write_text(json.dumps(record))
    for name, scores in {"culture": [(1, 2, 1, 0)], "science": [(701, 0, 2, 2), (702, 999, 999, 999)]}.items():
        keys = ("prompt_id", "consistency", "realism", "aesthetic_quality")
        entries = [dict(zip(keys, each, strict=True), Subcategory="x") for each in scores]
        lines(folder / f"wise/{name}_scores_results.jsonl", entries)
    (folder / "dpg_results.txt").write_text(
        "images/a.png, 1.0, 0.5, 0.75\nModel: images\nL1 category scores:\n\tentity: 80.5\n\tglobal: 70.25\n"
        "L2 category scores:\n\tentity - whole: 80.5\nDPG-Bench score: 75.125\n"
    )
    (folder / "annotation_blip").mkdir()
    (folder / "annotation_blip/blip_vqa_score.txt").write_text("BLIP-VQA score:0.4321")
    (folder / "genai").mkdir()
    torch.save(torch.tensor([[0.2], [0.4], [0.9]]), folder / "genai/clip-flant5-xxl_1600_prompts.pt")
    (folder / "genai/genai_skills.json").write_text(json.dumps({"counting": [0, 2], "advanced": [0, 1]}))
    (folder / "fid.json").write_text(json.dumps({
        "benchmark": "mjhq-fid", "measure": "fid", "value": 9.5, "features": "clean-fid 0.1.35", "resizing": "none",
        "drawn": {"images": 30000, "formats": {"PNG": 30000}},
        "reference": {"images": 30000, "formats": {"JPEG": 30000}},
    }))  # fmt: skip
    (folder / "20260101_results.json").write_text(json.dumps({
        "results": {
            "pope": {"alias": "pope", "pope_accuracy,none": 0.85, "pope_f1_score,none": 0.84,
                     "pope_f1_score_stderr,none": 0.1},
            "mme": {"alias": "mme", "mme_cognition_score,none": 300.0, "mme_perception_score,none": 1500.0},
            "own_task": {"alias": "own", "exact_match,none": 0.5},
        },
        "configs": {}, "n-samples": {"pope": {"original": 9000, "effective": 100}}, "config": {"limit": 100},
    }))  # fmt: skip
    return folder


def test_each_scorer_s_figures(results):
    report = gather(results)
    found = {(score["benchmark"], score["metric"]): score for score in report["scores"]}
    values = {key: round(score["value"], 6) for key, score in found.items()}
    assert values == {
        ("geneval", "overall"): 0.625,  # the mean of 2/2 and 1/4, not 3/6
        ("wise", "overall"): round((0.8 + 0.3) / 2, 6),
        ("dpg", "score"): 75.125,
        ("t2i-compbench", "BLIP-VQA"): 0.4321,
        ("genai-bench", "all"): 0.5, ("genai-bench", "counting"): 0.55, ("genai-bench", "advanced"): 0.3,
        ("mjhq", "fid"): 9.5,
        ("pope", ""): 84.0, ("mme", ""): 1500.0, ("own_task", "exact_match"): 0.5,
    }  # fmt: skip
    assert found["dpg", "score"]["details"] == {"entity": 80.5, "global": 70.25}
    assert found["wise", "overall"]["details"] == pytest.approx({"cultural": 0.8, "biology": 0.3})
    assert "998 of 1,000 prompts have no score" in found["wise", "overall"]["differs"]
    assert found["geneval", "overall"]["paper"] == {"DualToken-3B": 0.72, "DualToken-7B": 0.75}
    assert "guidance 5.0" in found["geneval", "overall"]["differs"]
    assert found["pope", ""]["paper"]["DualToken-7B, 384 px"] == 89.4
    assert "--limit 100: not the whole benchmark" in found["pope", ""]["differs"]
    assert found["genai-bench", "advanced"]["paper"]["VILA-U-3B, as reproduced there"] == 0.60
    assert "PNG against JPEG" in found["mjhq", "fid"]["differs"] and report["unread"] == {}


def test_page_card_and_what_cannot_be_read(results, tmp_path, capsys):
    """The card's section is replaced, not repeated; a report does not read what a report wrote."""
    (results / "bad.json").write_text('{"benchmark": "scenes"')
    model = tmp_path / "hf"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "README.md").write_text("# A model\n\n## Training\nlong\n")
    main(["report", str(results), "--model", str(model)])
    said, card = capsys.readouterr().out, (model / "README.md").read_text()
    assert "could not be read" in said and "bad.json" in said and "11 scores" in said
    assert "| geneval overall | 0.625 | DualToken-3B: 0.72, DualToken-7B: 0.75 |" in card
    (results / "annotation_blip/blip_vqa_score.txt").write_text("BLIP-VQA score:0.5")
    main(["report", str(results), "--model", str(model)])
    again = (model / "README.md").read_text()
    assert again == card.replace("| t2i-compbench BLIP-VQA | 0.432 |", "| t2i-compbench BLIP-VQA | 0.500 |")
    assert again.startswith("# A model\n\n## Training\nlong\n\n") and again.count("## Scores") == 1
    page = (results / "scores.html").read_text()
    assert "1500.0" in page and "VILA-U-3B" in page and "bad.json" in page


def test_wrong_folders_are_told(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        gather(tmp_path / "none")
