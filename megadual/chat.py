"""Talk to an exported model in the terminal: `python -m megadual.chat DIR`."""

import argparse
import shlex
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from megadual.errors import UserError, command
from megadual.hf.folder import open_folder

HELP = """\
describe PATH [TEXT]   a text for an image, going on from TEXT
draw PROMPT            an image, saved as a PNG; the seed goes up by one with each
ask "TEXT" [PATH ...]  an answer in text and images; each PATH is an image that stands before TEXT
/set NAME VALUE        one of the options below
/help, /quit           this page; the end (or Ctrl-D)"""
OPTIONS = {"seed": int, "cfg_scale": float, "temperature": float, "top_k": int, "top_p": float, "max_new_tokens": int}


class Chat:
    """One conversation: the model, the options and where images go."""

    def __init__(self, model, output: Path, options: dict):
        self.model, self.output, self.options = model, output, options

    def reply(self, line: str) -> str | None:
        """What a typed line gets; UserError for a mistake in it; None at the end."""
        word, _, rest = line.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return None
        commands = {"describe": self.describe, "draw": self.draw, "ask": self.ask, "/set": self.set}
        if word in commands and rest.strip():
            return commands[word](rest.strip())
        shown = ", ".join(f"{name} {value}" for name, value in self.options.items())
        if word in ("", "/help"):
            return f"{HELP}\noptions: {shown}"
        raise UserError(f"'{line.strip()}' is not understood; /help shows what is")

    def describe(self, rest: str) -> str:
        path, *words = split(rest)
        limit = self.options["max_new_tokens"]
        (text,) = self.model.describe([read_image(path)], " ".join(words), max_new_tokens=limit)
        return text.strip()

    def draw(self, prompt: str) -> str:
        (image,) = self.model.draw(prompt, progress=True, **self._drawing())
        return self._save(image)

    def ask(self, rest: str) -> str:
        text, *paths = split(rest)
        content = [{"type": "image", "image": read_image(path)} for path in paths] + [{"type": "text", "text": text}]
        answer = self.model.interleave(
            [{"role": "user", "content": content}],
            max_new_tokens=self.options["max_new_tokens"],
            progress=True,
            **self._drawing(),
        )
        return "\n".join(part.strip() if isinstance(part, str) else self._save(part) for part in answer)

    def set(self, rest: str) -> str:
        name, _, value = rest.partition(" ")
        if name not in OPTIONS:
            raise UserError(f"there is no option '{name}'; there are {', '.join(OPTIONS)}")
        try:
            self.options[name] = OPTIONS[name](value)
        except ValueError as error:
            raise UserError(f"{name} {value}: it takes {'a whole ' if OPTIONS[name] is int else 'a '}number") from error
        return f"{name} is {self.options[name]}"

    def _drawing(self) -> dict:
        return {name: self.options[name] for name in ("seed", "cfg_scale", "temperature", "top_k", "top_p")}

    def _save(self, image: Image.Image) -> str:
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"drawing-{self.options['seed']:06d}.png"
        image.save(path)
        self.options["seed"] += 1
        return str(path)


def split(text: str) -> list[str]:
    """Words as a shell has them: quotes keep blanks together."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"'{text}': a quote is not closed") from error


def read_image(path: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except Exception as error:  # of PIL's decoders: whatever unpacking wrong bytes leads to
        raise UserError(f"'{path}' cannot be read as an image: {error}") from error


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="DIR", help="exported folder")
    parser.add_argument("--output", type=Path, default=Path("drawings"), help="folder for images (default: drawings)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    args = parser.parse_args(argv)
    chat = Chat(
        open_folder(args.model, args.device),
        args.output,
        dict(seed=args.seed, cfg_scale=3.0, temperature=1.0, top_k=900, top_p=0.96, max_new_tokens=64),
    )
    prompt = "> " if sys.stdin.isatty() else ""
    tqdm.write(f"{args.model} on {chat.model.device}. /help shows what to type.", file=sys.stderr)
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        try:
            reply = chat.reply(line)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if reply is None:
            return
        print(reply, flush=True)


if __name__ == "__main__":
    main()
