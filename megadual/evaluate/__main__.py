"""`python -m megadual.evaluate COMMAND`: draw a benchmark's pictures, score scenes, put all scores side by side."""

import argparse
from importlib import import_module

from megadual.errors import command

COMMANDS = {
    "draw": ("draw", "pictures of a benchmark's prompts, where its own scorer looks for them"),
    "fid": ("fid", "the Fréchet distance between drawn pictures and real ones"),
    "train-detector": ("detector", "a small detector of drawings, that `scenes` scores pictures with"),
    "scenes": ("scenes", "describing, answering, drawing and editing held-out scenes"),
    "checkpoint": ("checkpoint", "`scenes` for a training run's checkpoint"),
    "report": ("report", "all scores below a folder, each beside the paper's"),
}


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m megadual.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, about) in COMMANDS.items():
        module = import_module(f"megadual.evaluate.{module_name}")
        of = commands.add_parser(
            name, help=about, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(of)
        of.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
