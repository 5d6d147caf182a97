"""Scores of scenes: shares of what is right, by axis, kind and task."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megadual.evaluate.grammar import Said, parse
from megadual.evaluate.judge import AXES
from megadual.synthetic.scenes import Scene

ABSENT = ("no", "none")

DESCRIBED = {
    "kind": "which things there are",
    "count": "how many of each",
    "ground": "the ground's colour",
    "place": "where they are",
    "size": "how large they are, where it is said",
    "all": "kinds, counts, ground and places",
}
ASKED = {
    "negation": "of all questions, those whose answer is 'no' or 'none'",
    "overall": "the exact answer",
}
EDITED = {
    "change": "the change that was asked for is made",
    "rest": "all else is as it was",
    "all": "both",
}

Judged = list[dict[str, bool]]


@dataclass(frozen=True)
class Row:
    """A line of the table of scores; shares from 0 to 1, None where there is none."""

    task: str
    name: str
    about: str
    right: float | None
    chance: float | None
    reconstructions: float | None  # what the detector makes of the tokenizer's pictures of the truth
    originals: float | None  # and of the true pictures
    of: int

    @property
    def whole(self) -> bool:
        """Whether it is the task's one figure."""
        return (self.task, self.name) in (
            ("describe", "all"),
            ("ask", "overall"),
            ("draw", "overall"),
            ("edit", "both"),
        )


def table(scores: dict) -> Iterator[Row]:
    """What `scenes` found, as lines: each score beside chance and beside its ceiling."""

    def row(task: str, name: str, about: str, look, of: int) -> Row:
        """`look` finds the share in scores of the task's form."""
        found = scores[task]
        beside = [found["chance"], found["ceiling"]["reconstructions"], found["ceiling"]["originals"]]
        return Row(task, name, about, look(found), *map(look, beside), of)

    for name, about in DESCRIBED.items() if "describe" in scores else ():
        of = scores["describe"][name]["of"]
        yield row("describe", name, about, lambda found, name=name: found.get(name, {}).get("right"), of)
    for name, found in scores.get("ask", {}).items():
        yield Row("ask", name, ASKED.get(name, ""), found["right"], found["blind"], None, None, found["of"])
    if "draw" in scores:
        for axis, found in scores["draw"]["axes"].items():
            yield row("draw", axis, AXES[axis], lambda of, axis=axis: of["axes"][axis]["right"], found["of"])
        of = max(found["of"] for found in scores["draw"]["axes"].values())
        yield row("draw", "overall", "the mean of the axes but negation", lambda found: found["overall"], of)
        yield row("draw", "all right", "all that was asked for, and nothing else", lambda of: of["all_right"], of)
    if "edit" in scores:
        for task, found in scores["edit"].items():
            if task not in ("chance", "ceiling", "overall"):
                yield row("edit", task, EDITED["all"], lambda of, task=task: of[task]["all"], found["of"])
        of = scores["edit"]["overall"]["of"]
        for key, name in (("change", "change"), ("rest", "rest"), ("all", "both")):
            yield row("edit", name, EDITED[key], lambda found, key=key: found["overall"][key], of)


def shares(judged: Judged, names: Iterable[str]) -> dict[str, dict]:
    """Of each axis: the share that is right, of how many."""
    table = {}
    for name in names:
        values = [each[name] for each in judged if name in each]
        table[name] = {"right": sum(values) / len(values) if values else None, "of": len(values)}
    return table


def drawing_scores(judged: Judged) -> dict:
    """The axes, the mean of those that GenEval has (as its overall is), and the share with everything right.

    Nearly every picture is right on `negation`, whatever it was drawn from: it would only lift the mean.
    """
    axes = shares(judged, AXES)
    known = [each["right"] for axis, each in axes.items() if each["of"] and axis != "negation"]
    return {"axes": axes, "overall": sum(known) / len(known), "all_right": shares(judged, ["all"])["all"]["right"]}


def edit_scores(tasks: list[str], judged: Judged) -> dict:
    """By task and over all: the share whose change was made, whose rest is as it was, and both."""
    by_task = defaultdict(list)
    for task, each in zip(tasks, judged, strict=True):
        by_task[task].append(each)
        by_task["overall"].append(each)
    table = {}
    for task, of in sorted(by_task.items()):
        right = {name: values["right"] for name, values in shares(of, ("change", "rest", "all")).items()}
        table[task] = right | {"of": len(of)}
    return table


def description(scene: Scene, caption: str) -> dict[str, bool]:
    """What a caption says rightly of a scene; nothing where it is not of the grammar. The size is not part of `all`."""
    true, said = Said.of(scene), parse(caption)
    right = {
        "parsed": said is not None,
        "kind": said is not None and said.kinds == true.kinds and said.without not in true.kinds,
        "count": said is not None and said.counts == true.counts,
        "ground": said is not None and said.ground == true.ground,
        "place": said is not None and said.places == true.places,
        "size": said is not None and said.sizes == true.sizes,
    }
    return right | {"all": all(right[name] for name in ("kind", "count", "ground", "place"))}


def question_scores(answers: list[dict]) -> dict:
    """By kind and over all: the share that is right, and that which the commonest right answer of each kind would get.

    `negation` is of the questions whose right answer is that something is not there, or not so.
    """
    kinds = defaultdict(list)
    for each in answers:
        kinds[each["kind"]].append(each)
    table, blind_total = {}, 0
    for kind, asked in sorted(kinds.items()):
        blind = Counter(each["answer"] for each in asked).most_common(1)[0][1]
        blind_total += blind
        table[kind] = {
            "right": sum(e["right"] for e in asked) / len(asked),
            "blind": blind / len(asked),
            "of": len(asked),
        }
    negated = [each for each in answers if each["answer"] in ABSENT]
    overall = {"right": sum(e["right"] for e in answers) / len(answers), "blind": blind_total / len(answers)}
    table["overall"] = overall | {"of": len(answers)}
    if negated:
        right = sum(each["right"] for each in negated) / len(negated)
        table["negation"] = {"right": right, "blind": None, "of": len(negated)}
    return table
