"""VLMEvalKit with an exported model, which it has no plug-ins for: registered here, then its own run.py.

    python -m megadual_harnesses.vlmevalkit --export DIR --data MMBench_DEV_EN MME POPE --work-dir OUTPUT

--name is the model's name in its results; all other arguments are run.py's. On several GPUs:
torchrun --nproc-per-node 8 -m megadual_harnesses.vlmevalkit ...
"""

import argparse
import sys
from functools import partial

import torch
from vlmeval import run  # before torch sees the GPUs: it gives each process its own
from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from megadual_harnesses.answers import Answers, Sampling, interleaved


class MegaDual(BaseModel):
    """Answers VLMEvalKit's messages, greedily unless `temperature` is given, one at a time as it asks them."""

    INTERLEAVE = True
    allowed_types = ["text", "image"]

    def __init__(self, model_path: str, max_new_tokens: int = 1024, temperature: float = 0.0, seed: int = 0, **kwargs):
        super().__init__()
        self.answers = Answers(model_path, "cuda" if torch.cuda.is_available() else "cpu")
        self.answers.processor.allow_paths = True  # VLMEvalKit gives its images as files
        self.sampling, self.seed = Sampling(max_new_tokens=max_new_tokens, temperature=temperature), seed

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        return self._answer([{"role": "user", "content": message}])

    def chat_inner(self, message: list[dict], dataset: str | None = None) -> str:
        return self._answer(message)

    def _answer(self, messages: list[dict]) -> str:
        conversation = [
            {"role": message["role"], "content": [_part(part) for part in message["content"]]} for message in messages
        ]
        (text,) = self.answers.texts([interleaved(conversation)], self.sampling, [self.seed])
        return text.strip()


def _part(part: dict) -> dict:
    key = "text" if part["type"] == "text" else "image"
    return {"type": part["type"], key: part["value"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True, help="the exported folder")
    parser.add_argument("--name", default="megadual", help="the model's name in VLMEvalKit's results")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    arguments, others = parser.parse_known_args()
    supported_VLM[arguments.name] = partial(
        MegaDual, model_path=arguments.export, max_new_tokens=arguments.max_new_tokens
    )
    sys.argv = [sys.argv[0], "--model", arguments.name, *others]
    run.main()


if __name__ == "__main__":
    main()
