"""Small benchmarks made of composed scenes, in the files of POPE, MME and MMBench, and tasks of lmms-eval on them."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from megadual.synthetic.drawings import DRAWINGS, GROUNDS, article, plural
from megadual.synthetic.files import png_bytes
from megadual.synthetic.scenes import NUMBERS, OPPOSITES, Scene, draw_scene, relation, render

ROTATION = 1_000_000  # what MMBench adds to the index of a question whose options are rotated once more
SPLITS = {"pope": "test", "mme": "test", "mmbench": "dev"}
TEMPLATES = {
    "pope": "pope/pope.yaml",
    "mme": "mme/mme.yaml",
    "mmbench": "mmbench/mmbench_en_dev_static.yaml",
}  # lmms-eval's own, below its tasks


def scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [draw_scene(rng) for _ in range(count)]


def pope_rows(shown: list[Scene], size: int, seed: int = 0) -> list[dict]:
    """For each scene one question about what is there, and one about what is not."""
    rng, rows = random.Random(seed), []
    for scene in shown:
        there = {group.name for group in scene.groups}
        absent = rng.choice([name for name in DRAWINGS if name not in there])
        for name, answer in ((scene.groups[0].name, "yes"), (absent, "no")):
            rows.append(
                {
                    "question_id": str(len(rows)),
                    "question": f"Is there {article(name)} in the image?",
                    "answer": answer,
                    "image": _image(scene, size),
                }
            )
    return rows


def mme_rows(shown: list[Scene], size: int, seed: int = 0) -> list[dict]:
    """Pairs of questions about a scene, the first to be answered with yes, of four categories of both parts."""
    rng, rows = random.Random(seed), []
    for i, scene in enumerate(shown):
        group = scene.groups[0]
        asked = {
            "existence": [
                f"Is there {article(name)} in this image?"
                for name in (group.name, rng.choice([n for n in DRAWINGS if n not in {g.name for g in scene.groups}]))
            ],
            "color": [
                f"Is the ground {ground}?"
                for ground in (scene.ground, rng.choice([g for g in GROUNDS if g != scene.ground]))
            ],
            "numerical_calculation": [
                f"Is {NUMBERS[count]} the number of {plural(group.name)}?"
                for count in (group.count, rng.choice([n for n in range(1, 5) if n != group.count]))
            ],
        }
        if scene.kind == "relation":
            place, other = relation(group.region, scene.groups[1].region), scene.groups[1].noun
            asked["position"] = [f"Is the {group.noun} {where} the {other}?" for where in (place, OPPOSITES[place])]
        category = list(asked)[i % len(asked)]
        for question, answer in zip(asked[category], ("Yes", "No"), strict=True):
            rows.append(
                {
                    "question_id": f"{category}/{i:04d}.png",
                    "category": category,
                    "question": f"{question} Please answer yes or no.",
                    "answer": answer,
                    "image": _image(scene, size),
                }
            )
    return rows


def mmbench_rows(shown: list[Scene], size: int, seed: int = 0) -> list[dict]:
    """A question of four options about each scene, every other one asked again with its options rotated.

    MMBench counts a question where it is answered right in every rotation.
    """
    rng, rows = random.Random(seed), []
    for i, scene in enumerate(shown):
        if i % 2:
            question, right, others, category = "What colour is the ground?", scene.ground, GROUNDS, "attribute"
        else:
            question, right, others, category = "What is in the image?", scene.groups[0].name, DRAWINGS, "object"
        wrong = [name for name in others if name != right and name not in {group.name for group in scene.groups}]
        options = [right, *rng.sample(wrong, 3)]
        rng.shuffle(options)
        for turn in range(1 + i // 2 % 2):
            turned = options[turn:] + options[:turn]
            rows.append(
                {
                    "index": i + turn * ROTATION,
                    "question": question,
                    "hint": "Everything is drawn." if i % 3 == 0 else "nan",
                    **dict(zip("ABCD", turned, strict=True)),
                    "answer": "ABCD"[turned.index(right)],
                    "category": category,
                    "L2-category": f"{category} perception",
                    "source": "scenes",
                    "split": "dev",
                    "image": _image(scene, size),
                }
            )
    return rows


IMAGE_FIELDS = [("bytes", pa.binary()), ("path", pa.string())]
ROWS = {"pope": pope_rows, "mme": mme_rows, "mmbench": mmbench_rows}


def write_rows(path: Path, rows: list[dict]) -> None:
    """A parquet file whose images the datasets library decodes, as its own files say it."""
    schema = pa.Table.from_pylist(rows).schema
    schema = schema.set(schema.get_field_index("image"), pa.field("image", pa.struct(IMAGE_FIELDS)))
    features = {field.name: {"_type": "Value", "dtype": str(field.type)} for field in schema} | {
        "image": {"_type": "Image"}
    }
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.Table.from_pylist(rows, schema.with_metadata(told)), path)


def write_tasks(folder: Path, tasks: Path, rows: dict[str, list[dict]]) -> list[str]:
    """Files and tasks of lmms-eval for them, which are its own (below `tasks`) but for the data; the tasks' names."""
    names = []
    for benchmark, template in TEMPLATES.items():
        write_rows(folder / f"{benchmark}.parquet", rows[benchmark])
        task = {
            "include": str(tasks / template),
            "task": f"scenes_{benchmark}",
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {SPLITS[benchmark]: str(folder / f"{benchmark}.parquet")}},
        }
        names.append(str(task["task"]))
        (folder / f"{names[-1]}.yaml").write_text(yaml.safe_dump(task))
    return names


def pope_scores(rows: list[dict], answers: Iterable[str]) -> dict[str, float]:
    """POPE's scores of answers in the rows' order."""
    said = [(answer.strip().lower(), row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    hits = sum(answer == "yes" == right for answer, right in said)
    precision = hits / max(1, sum(answer == "yes" for answer, _ in said))
    recall = hits / max(1, sum(right == "yes" and answer in ("yes", "no") for answer, right in said))
    return {
        "pope_accuracy": sum(answer == right for answer, right in said) / len(said),
        "pope_precision": precision,
        "pope_recall": recall,
        "pope_f1_score": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "pope_yes_ratio": sum(right == "yes" for _, right in said) / len(said),  # lmms-eval's: of the right answers
    }


def mme_scores(rows: list[dict], answers: Iterable[str]) -> dict[str, float]:
    """MME's two scores: for each category the share of right answers and of right pairs, in %, added up."""
    pairs: dict[str, dict[str, list[bool]]] = {}
    for answer, row in zip(answers, rows, strict=True):
        right = answer.strip().lower().replace(".", "").startswith(row["answer"].lower())
        pairs.setdefault(row["category"], {}).setdefault(row["question_id"], []).append(right)
    scores = {"mme_perception_score": 0.0, "mme_cognition_score": 0.0}
    for category, of in pairs.items():
        part = "mme_cognition_score" if category == "numerical_calculation" else "mme_perception_score"
        scores[part] += 100 * sum(sum(pair) / 2 + all(pair) for pair in of.values()) / len(of)
    return scores


def mmbench_score(rows: list[dict], answers: Iterable[str]) -> float:
    """The share of questions, in %, that are answered with the right letter in every rotation."""
    right: dict[int, bool] = {}
    for answer, row in zip(answers, rows, strict=True):
        question = row["index"] % ROTATION
        right[question] = right.get(question, True) and answer.strip() == row["answer"]
    return 100 * sum(right.values()) / len(right)


def _image(scene: Scene, size: int) -> dict:
    return {"bytes": png_bytes(render(scene, size)), "path": None}
