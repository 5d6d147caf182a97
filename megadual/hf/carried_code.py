"""The Python files that an exported folder carries: megadual's modules that the three classes need, side by side."""

import re
from pathlib import Path

import megadual

AUTO_MAP = {
    "AutoConfig": "configuration_megadual.MegaDualConfig",
    "AutoModelForCausalLM": "modeling_megadual.MegaDualForCausalLM",
    "AutoProcessor": "processing_megadual.MegaDualProcessor",
}
# Indented ones are within `try`: kernels, which the folder does without.
_IMPORT = re.compile(r"^from (megadual[\w.]*|\.\w[\w.]*) import", flags=re.MULTILINE)


def file_name(module: str) -> str:
    """megadual.vision.tokenizer -> vision_tokenizer, megadual.hf.decoding -> decoding."""
    return module.removeprefix("megadual.").removeprefix("hf.").replace(".", "_")


def _source(module: str) -> str:
    return (Path(megadual.__file__).parents[1] / f"{module.replace('.', '/')}.py").read_text()


def _absolute(imported: str, module: str) -> str:
    return module.rpartition(".")[0] + imported if imported.startswith(".") else imported


def _needed(module: str) -> set[str]:
    """The modules of megadual that a module imports, directly and not."""
    found, waiting = set(), [module]
    while waiting:
        module = waiting.pop()
        new = {_absolute(match[1], module) for match in _IMPORT.finditer(_source(module))} - found
        found |= new
        waiting += new
    return found


def _flat(module: str) -> str:
    """A module's source, its imports of megadual made relative to the folder."""
    return _IMPORT.sub(lambda match: f"from .{file_name(_absolute(match[1], module))} import", _source(module))


def write_code(folder: Path) -> None:
    """Write the files of AUTO_MAP and of all that they need."""
    for entry in AUTO_MAP.values():
        module = f"megadual.hf.{entry.partition('.')[0]}"
        needed, code = sorted(_needed(module)), _flat(module)
        direct = {_absolute(match[1], module) for match in _IMPORT.finditer(_source(module))}
        if named := [f"    from .{file_name(name)} import *  # noqa: F403\n" for name in needed if name not in direct]:
            code += "\n\nif False:  # transformers 4 brings only the files that this one names\n" + "".join(named)
        (folder / f"{file_name(module)}.py").write_text(code)
        for name in needed:
            path = folder / f"{file_name(name)}.py"
            if not path.exists():
                path.write_text(_flat(name))
