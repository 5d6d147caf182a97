"""The Python files that an exported folder carries: the modules of megadual that its three classes need, side by side.

transformers loads such code from one flat folder, whose files import each other as `from .name import`. So a module
`megadual.vision.tokenizer` becomes the file vision_tokenizer.py, and only the first line of each import of megadual is
another. Imports within `try` are left as they are: kernels, which the folder does without.
"""

import ast
from pathlib import Path

import megadual

AUTO_MAP = {
    "AutoConfig": "configuration_megadual.MegaDualConfig",
    "AutoModel": "modeling_megadual.MegaDualForCausalLM",
    "AutoModelForCausalLM": "modeling_megadual.MegaDualForCausalLM",
    "AutoModelForImageTextToText": "modeling_megadual.MegaDualForCausalLM",
    "AutoProcessor": "processing_megadual.MegaDualProcessor",
}


def write_code(folder: Path) -> None:
    """Write the files of AUTO_MAP and of all that they need."""
    classes, modules = _modules()
    for module in modules:
        named = _named(_needed(module) - _imported(module)) if module in classes else ""
        (folder / f"{_file_name(module)}.py").write_text(_rewritten(module) + named)


def code_files() -> set[str]:
    """The names of what `write_code` writes."""
    return {f"{_file_name(module)}.py" for module in _modules()[1]}


def _modules() -> tuple[set[str], set[str]]:
    """Those of AUTO_MAP's classes, and these with all that they need."""
    classes = {f"megadual.hf.{entry.partition('.')[0]}" for entry in AUTO_MAP.values()}
    return classes, classes.union(*map(_needed, classes))


def _file_name(module: str) -> str:
    """megadual.vision.tokenizer -> vision_tokenizer, megadual.hf.decoding -> decoding."""
    return module.removeprefix("megadual.").removeprefix("hf.").replace(".", "_")


def _source(module: str) -> str:
    return (Path(megadual.__file__).parents[1] / f"{module.replace('.', '/')}.py").read_text()


def _import_lines(module: str) -> dict[int, str]:
    """The lines (from 0) on which a module's own imports of megadual begin, and what each imports."""
    package, found = module.rpartition(".")[0], {}
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("megadual.")):
            found[node.lineno - 1] = f"{package}.{node.module}" if node.level else node.module
    return found


def _imported(module: str) -> set[str]:
    return set(_import_lines(module).values())


def _needed(module: str) -> set[str]:
    """What a module imports, directly and not."""
    found, waiting = set(), [module]
    while waiting:
        new = _imported(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def _rewritten(module: str) -> str:
    lines = _source(module).splitlines(keepends=True)
    for number, imported in _import_lines(module).items():
        lines[number] = f"from .{_file_name(imported)} import" + lines[number].partition(" import")[2]
    return "".join(lines)


def _named(modules: set[str]) -> str:
    """transformers 4 brings only the files that the class's own file names, so this names the others."""
    lines = [f"    from .{_file_name(module)} import *  # noqa: F403\n" for module in sorted(modules)]
    return "\n\nif False:\n" + "".join(lines) if lines else ""
