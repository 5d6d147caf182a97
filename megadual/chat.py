"""Talk to an exported model in the terminal: `python -m megadual.chat DIR`."""

import argparse
import io
import shlex
import sys
import unicodedata
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from megadual.errors import UserError, command
from megadual.hf.folder import open_folder
from megadual.images import read_image

HELP = """\
a line                 what you say; the answer, in texts and images, goes on from all that was said
/image PATH [PATH ...] images that stand before the next line
/draw PROMPT           an image of a caption
/edit INSTRUCTION      the last image, or the one of /image, changed
/describe [PATH]       a caption of that image, or of the last one
/history, /reset       what was said so far; begin anew
/set NAME VALUE        one of the options below
/help, /quit           this page; the end (or Ctrl-D); Ctrl-C ends an answer"""
# Of each option its type and the least value.
OPTIONS: dict[str, tuple[type, float]] = {
    "seed": (int, 0), "cfg_scale": (float, 0), "image_scale": (float, 0), "temperature": (float, 0.01),
    "top_k": (int, 1), "top_p": (float, 0.01), "text_temperature": (float, 0), "max_new_tokens": (int, 1),
}  # fmt: skip
MOST_SHOWN = 300  # characters of an error
DEFAULTS = dict(
    seed=0, cfg_scale=3.0, image_scale=1.5, temperature=1.0, top_k=900, top_p=0.96, text_temperature=0.0,
    max_new_tokens=256,
)  # fmt: skip


class Chat:
    """One conversation: the model, what was said, the options and where images go.

    Images are saved as PNGs that are named by their seed, which goes up by one with each.
    """

    def __init__(self, model, output: Path, options: dict):
        self.model, self.output, self.options = model, output, DEFAULTS | options
        self.reset("")

    def reply(self, line: str) -> str | None:
        """What a typed line gets; ValueError for a mistake in it, which changes nothing; None at the end."""
        line = readable(line.strip())
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return None
        if word in ("", "/help"):
            shown = ", ".join(f"{name} {value}" for name, value in self.options.items())
            return f"{HELP}\noptions: {shown}"
        if not word.startswith("/"):
            return self.say(line)
        commands = {
            "/image": self.attach, "/draw": self.draw, "/edit": self.edit, "/describe": self.describe,
            "/history": self.history, "/reset": self.reset, "/set": self.set,
        }  # fmt: skip
        if word not in commands:
            raise UserError(f"'{word}' is not understood; /help shows what is")
        if not rest.strip() and word in ("/image", "/draw", "/edit", "/set"):
            raise UserError(f"{word} needs more than its name; /help shows what")
        return commands[word](rest.strip())

    def say(self, text: str) -> str:
        said = {"role": "user", "content": [*self.attached, text]}
        answer = self.model.interleave(
            [*self.messages, said],
            max_new_tokens=self.options["max_new_tokens"],
            text_temperature=self.options["text_temperature"],
            progress=True,
            **self._drawing(),
        )
        return self._keep(said, answer)

    def draw(self, prompt: str) -> str:
        images = self.model.draw(prompt, progress=True, **self._drawing())
        return self._keep({"role": "user", "content": [prompt]}, images)

    def edit(self, instruction: str) -> str:
        source, scale = self._image(), self.options["image_scale"]
        images = self.model.edit(source, instruction, image_scale=scale, progress=True, **self._drawing())
        return self._keep({"role": "user", "content": [*self.attached, instruction]}, images)

    def describe(self, rest: str) -> str:
        image = image_file(*split(rest)[:1]) if rest else self._image()
        (text,) = self.model.describe([image], max_new_tokens=self.options["max_new_tokens"])
        return text.strip()

    def attach(self, rest: str) -> str:
        paths = split(rest)
        images = [image_file(path) for path in paths]
        self.attached += images
        self.names |= {id(image): path for image, path in zip(images, paths, strict=True)}
        return f"{len(self.attached)} before the next line"

    def history(self, _: str) -> str:
        return "\n".join(f"{message['role']}: {self._shown(message['content'])}" for message in self.messages)

    def reset(self, _: str) -> str:
        self.messages: list[dict] = []
        self.attached: list[Image.Image] = []
        self.names: dict[int, str] = {}  # of each image by its id, the file; the messages keep the images
        return "a new conversation"

    def set(self, rest: str) -> str:
        name, _, value = rest.partition(" ")
        if name not in OPTIONS:
            raise UserError(f"there is no option '{name}'; there are {', '.join(OPTIONS)}")
        kind, least = OPTIONS[name]
        try:
            number = kind(value)
        except ValueError as error:
            raise UserError(f"{name} {value}: it takes {'a whole ' if kind is int else 'a '}number") from error
        if not least <= number < 2**31:  # nor is nan
            raise UserError(f"{name} {value}: it must be at least {least} and below 2**31")
        self.options[name] = number
        return f"{name} is {number}"

    def _image(self) -> Image.Image:
        """The one attached, or the last of the conversation."""
        parts = [part for message in self.messages for part in message["content"]] + self.attached
        images = [part for part in parts if not isinstance(part, str)]
        if not images:
            raise UserError("there is no image yet; /image PATH gives one")
        return images[-1]

    def _drawing(self) -> dict:
        return {name: self.options[name] for name in ("seed", "cfg_scale", "temperature", "top_k", "top_p")}

    def _keep(self, said: dict, answer: list[str | Image.Image]) -> str:
        """What was said and answered, images saved, becomes part of the conversation; the answer as it is shown."""
        for part in answer:
            if not isinstance(part, str):
                self.names[id(part)] = self._save(part)
        self.messages += [said, {"role": "assistant", "content": answer}]
        self.attached = []
        return "\n".join(part.strip() if isinstance(part, str) else self.names[id(part)] for part in answer)

    def _shown(self, parts: list[str | Image.Image]) -> str:
        return " ".join(part.strip() if isinstance(part, str) else f"[{self.names[id(part)]}]" for part in parts)

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


def readable(line: str) -> str:
    """`line`; UserError where it holds what nobody types: zero bytes, and bytes that are no UTF-8."""
    for character in line:
        if unicodedata.category(character) in ("Cc", "Cs") and character != "\t":
            raise UserError(f"the line holds U+{ord(character):04X}, which is no text")
    return line


def image_file(path: str) -> Image.Image:
    try:
        return read_image(path)
    except ValueError as error:
        raise UserError(f"'{path}' cannot be read as an image: {error}") from error


def one_line(error: BaseException) -> str:
    """What is said of a mistake, however long a line led to it."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    said = (str(error).splitlines() or [""])[0]
    named = (
        said if said and isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {said}"
    )
    return named if len(named) <= MOST_SHOWN else f"{named[:MOST_SHOWN]} ..."


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
    chat = Chat(open_folder(args.model, args.device), args.output, {"seed": args.seed})
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text cost their line, not the conversation
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # nor do characters that the terminal has not
    prompt = "> " if sys.stdin.isatty() else ""
    tqdm.write(f"{args.model} on {chat.model.device}. /help shows what to type.", file=sys.stderr)
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not prompt:
                raise
            print()
            continue
        try:
            reply = chat.reply(line)
        except (Exception, KeyboardInterrupt) as error:  # whatever a line leads to, the conversation is kept
            print(f"error: {one_line(error)}", file=sys.stderr)
            continue
        if reply is None:
            return
        print(reply, flush=True)


if __name__ == "__main__":
    main()
