"""Result files of the benchmarks' own scorers, recognised by what is in them.

| scorer | file |
| --- | --- |
| `megadual.evaluate scenes` and `fid` | their JSON |
| GenEval, evaluate_images.py | JSON lines with `tag` and `correct` |
| WISE, gpt_eval.py | JSON lines with `prompt_id`, `consistency`, `realism`, `aesthetic_quality`; a folder's together |
| GenAI-Bench, evaluate.py | `*_prompts.pt`, with genai_skills.json in the searched folder |
| DPG-Bench, compute_dpg_bench.py | text with `DPG-Bench score:` |
| T2I-CompBench, BLIP_vqa.py | `blip_vqa_score.txt` |
| lmms-eval | JSON with `results` and `configs` |
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

LARGEST = 1 << 28  # bytes of a file that is looked into


@dataclass
class Score:
    """One figure. `differs`: how it was taken, beyond what is always so."""

    benchmark: str
    metric: str
    value: float
    file: str
    of: int | None = None  # items that it is taken over
    differs: str = ""
    details: dict = field(default_factory=dict)


# lmms-eval's task -> (benchmark, its metric, what one is multiplied with to get the paper's scale)
LMMS = {
    "pope": ("pope", "pope_f1_score", 100),
    "mmbench_en_dev": ("mmbench", "gpt_eval_score", 1),
    "mmbench_en_dev_static": ("mmbench", "gpt_eval_score", 1),
    "seedbench": ("seedbench", "seed_image", 100),
    "mmmu_val": ("mmmu", "mmmu_acc", 100),
    "mmvet": ("mmvet", "gpt_eval_score", 1),
    "mathvista_testmini": ("mathvista", "llm_as_judge_eval", 1),
    "mme": ("mme", "mme_perception_score", 1),
    "ai2d": ("ai2d", "exact_match", 100),
    "ocrbench": ("ocrbench", "ocrbench_accuracy", 100),
    "textvqa_val": ("textvqa", "exact_match", 100),
    "vqav2_val": ("vqav2", "exact_match", 100),
}
WISE_CATEGORIES = {
    "cultural": range(1, 401), "time": range(401, 568), "space": range(568, 701),
    "biology": range(701, 801), "physics": range(801, 901), "chemistry": range(901, 1001),
}  # fmt: skip
WISE_WEIGHTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
GENAI_SKILLS = ("counting", "differentiation", "comparison", "negation", "universal", "basic", "advanced")


def find_scores(folder: Path) -> tuple[list[Score], dict[str, str]]:
    """All scores below a folder; and the files that look like results but can't be read, with the reason."""
    scores, unread, wise = [], {}, defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.suffix in READERS and path.is_file()):
        if path.stat().st_size > LARGEST or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".jsonl" and "consistency" in _first_line(path):
                wise[path.parent].append(path)
            else:
                scores += READERS[path.suffix](path, folder)
        except Exception as error:  # of files of others: whatever reading them leads to
            unread[str(path)] = f"{type(error).__name__}: {error}"
    for paths in wise.values():
        try:
            scores += _wise(paths)
        except Exception as error:
            unread[str(paths[0])] = f"{type(error).__name__}: {error}"
    return scores, unread


def _json(path: Path, folder: Path) -> Iterator[Score]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        return
    if found.get("benchmark") == "scenes":
        yield from _scenes(found, path)
    elif found.get("benchmark") == "mjhq-fid":
        how = f"{found['features']}; {found['resizing']}"
        formats = " against ".join("/".join(found[side]["formats"]) for side in ("drawn", "reference"))
        drawn = found["drawn"]["images"]
        yield Score("mjhq", found["measure"], found["value"], str(path), drawn, f"{how}; {formats}")
    elif isinstance(found.get("results"), dict) and "configs" in found:
        yield from _lmms(found, path)


def _scenes(found: dict, path: Path) -> Iterator[Score]:
    scores, file = found["scores"], str(path)
    if "describe" in scores:
        yield Score("scenes", "described, all right", scores["describe"]["all"]["right"], file, found["scenes"])
    if "ask" in scores:
        overall = scores["ask"]["overall"]
        how = f"the commonest answer gets {overall['blind']:.3f}"
        yield Score("scenes", "questions", overall["right"], file, overall["of"], how)
    for task, metric in (("draw", "overall"), ("edit", "all")):
        if task not in scores:
            continue
        of, ceiling = scores[task], scores[task]["ceiling"]["reconstructions"]
        value, bound = (x["overall"] if task == "draw" else x["overall"][metric] for x in (of, ceiling))
        name = "drawn, mean of the axes" if task == "draw" else "edits, the change and nothing else"
        yield Score(
            "scenes", name, value, file, found["scenes"], f"reconstructions of the true pictures get {bound:.3f}"
        )
        if task == "draw":
            for axis, share in of["axes"].items():
                if share["of"]:
                    yield Score("scenes", f"drawn, {axis}", share["right"], file, share["of"])


def _lmms(found: dict, path: Path) -> Iterator[Score]:
    limit = (found.get("config") or {}).get("limit")
    for task, metrics in found["results"].items():
        values = {
            name.partition(",")[0]: value for name, value in metrics.items()
            if isinstance(value, int | float) and "stderr" not in name
        }  # fmt: skip
        counts = (found.get("n-samples") or {}).get(task) or {}
        differs = f"--limit {limit}: not the whole benchmark" if limit else ""
        if task in LMMS and LMMS[task][1] in values:
            benchmark, metric, factor = LMMS[task]
            yield Score(benchmark, "", values[metric] * factor, str(path), counts.get("effective"), differs, values)
        elif values:
            metric, value = next(iter(values.items()))
            yield Score(task, metric, value, str(path), counts.get("effective"), differs, values)


def _json_lines(path: Path, folder: Path) -> Iterator[Score]:
    """GenEval's: its overall score is the mean over the tags, not over the images."""
    if not {"tag", "correct"} <= _first_line(path).keys():
        return
    tags = defaultdict(list)
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        tags[entry["tag"]].append(bool(entry["correct"]))
    shares = {tag: sum(right) / len(right) for tag, right in tags.items()}
    images = sum(map(len, tags.values()))
    yield Score("geneval", "overall", sum(shares.values()) / len(shares), str(path), images, details=shares)


def _wise(paths: list[Path]) -> Iterator[Score]:
    """The WiScore over all prompts, which is the sum over the categories with the benchmark's weights."""
    entries = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]
    judged = {entry["prompt_id"]: entry for entry in entries if all(entry[name] <= 2 for name in WISE_WEIGHTS)}
    scores = {
        number: sum(weight * entry[name] for name, weight in WISE_WEIGHTS.items()) / 2
        for number, entry in judged.items()
    }
    shares = {}
    for category, numbers in WISE_CATEGORIES.items():
        if of := [scores[number] for number in numbers if number in scores]:
            shares[category] = sum(of) / len(of)
    missing = 1000 - len(scores)
    differs = f"{missing} of 1,000 prompts have no score" if missing else ""
    yield Score("wise", "overall", sum(scores.values()) / len(scores), str(paths[0]), len(scores), differs, shares)


def _text(path: Path, folder: Path) -> Iterator[Score]:
    text = path.read_text()
    if match := re.search(r"DPG-Bench score: ([\d.]+)", text):
        level = re.findall(r"^\t([^:\n-]+): ([\d.]+)$", text.partition("L2 category")[0], re.MULTILINE)
        yield Score("dpg", "score", float(match[1]), str(path), details={name: float(value) for name, value in level})
    elif match := re.match(r"BLIP-VQA score:([\d.]+)", text):
        yield Score("t2i-compbench", "BLIP-VQA", float(match[1]), str(path))


def _tensor(path: Path, folder: Path) -> Iterator[Score]:
    """GenAI-Bench's VQAScores, a row for each prompt in order."""
    if not path.name.endswith("_prompts.pt"):
        return
    scores = torch.load(path, weights_only=True, map_location="cpu").float().mean(dim=1)
    judge = path.name.rsplit("_", 2)[0]
    differs = "" if judge == "clip-flant5-xxl" else f"VQAScore by {judge}"
    yield Score("genai-bench", "all", scores.mean().item(), str(path), len(scores), differs)
    skills = next(iter(sorted(folder.rglob("genai_skills.json"))), None)
    if skills is None:
        return
    for skill, numbers in json.loads(skills.read_text()).items():
        if skill in GENAI_SKILLS:
            yield Score("genai-bench", skill, scores[numbers].mean().item(), str(path), len(numbers), differs)


def _first_line(path: Path) -> dict:
    with open(path) as file:
        try:
            entry = json.loads(file.readline())
        except ValueError:
            return {}
    return entry if isinstance(entry, dict) else {}


READERS: dict[str, Callable[[Path, Path], Iterator[Score]]] = {
    ".json": _json, ".jsonl": _json_lines, ".txt": _text, ".pt": _tensor,
}  # fmt: skip
