"""Short picture stories: a sentence and a picture in turn, one thing changing from picture to picture."""

import random
from dataclasses import asdict, dataclass

from megadual.synthetic.edits import TASKS
from megadual.synthetic.files import Members, json_bytes, png_bytes
from megadual.synthetic.scenes import RICH, Preset, Scene, draw_scene, render

SENTENCES = {  # in the past, where one and many have the same verb
    "add": "Then {what} came, {where}.",
    "remove": "Then {what} went away.",
    "move": "Then {what} moved {where}.",
    "recolour": "Then the ground turned {what}.",
}


@dataclass
class Story:
    sentences: list[str]
    scenes: list[Scene]  # after each sentence


def draw_story(rng: random.Random, preset: Preset = RICH) -> Story:
    """A random story of two to four pictures, no two of which have the same caption."""
    scene = draw_scene(rng, preset)
    story, length = Story([f"Here we see {scene.caption}."], [scene]), rng.choice([2, 3, 3, 4])
    while len(story.scenes) < length:
        change = TASKS[rng.choice(list(TASKS))](rng, story.scenes[-1], preset)
        if change and change.result.caption not in {scene.caption for scene in story.scenes}:
            story.sentences.append(SENTENCES[change.task].format(what=change.what, where=change.where))
            story.scenes.append(change.result)
    return story


def story_members(key: str, story: Story, size: int) -> Members:
    """An interleaved document as a webdataset sample: at each place a text or an image."""
    texts, images, pictures = [], [], []
    for number, (sentence, scene) in enumerate(zip(story.sentences, story.scenes, strict=True)):
        texts += [sentence, None]
        images += [None, f"{number}.png"]
        pictures.append((f"{key}.{number}.png", png_bytes(render(scene, size))))
    described = {"texts": texts, "images": images, "scenes": [asdict(scene) for scene in story.scenes]}
    return [(f"{key}.json", json_bytes(described)), *pictures]
