"""Configurations: dataclasses, filled strictly from YAML and dotted `key=value` overrides.

A schema is a dataclass of sections and keys (megadual/keys.py). `load_config` returns it filled, checked and resolved.
"""

import argparse
import dataclasses
import difflib
import io
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megadual.errors import UserError, first_line
from megadual.keys import MISSING, Key

Config = TypeVar("Config")
NEAR = 0.8  # how alike a wrong key and the one that was meant are at least


def load_config(
    schema: type[Config],
    path: str | Path | Sequence[str | Path] | None = None,
    overrides: Sequence[str] = (),
    assumed: Sequence[str] = (),
) -> Config:
    """A `schema` from its defaults, then the YAML at `path` (or several, in order), then `overrides`.

    `assumed` are overrides too, of what nothing else gives.

    A YAML file may name another one to start from, relative to itself, under `base`. Unknown keys, values of the wrong
    type or out of their bounds raise UserError. Where the schema has a method `resolve`, that fills what depends on
    other keys and raises UserError for what does not go together.
    """
    merged = OmegaConf.structured(schema)
    paths = [path] if isinstance(path, (str, Path)) else path or []
    layers = [layer for path in paths for layer in _read_yaml_chain(Path(path))]
    layers += [("command line", _read_override(override)) for override in overrides]
    names = _Names.of(schema)
    for place, layer in [*(("assumed", _read_override(override)) for override in assumed), *layers]:
        layer = _spelled_out(layer, schema)
        _check_keys(layer, schema, place, names)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(layer))
        except OmegaConfBaseException as error:
            raise UserError(f"{place}: {first_line(error)} ({getattr(error, 'full_key', '')})") from error
    try:
        config: Any = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        name = getattr(error, "full_key", "")
        raise UserError(f"config key '{name}' has no value; give it in the YAML or as {name}=...") from error
    except OmegaConfBaseException as error:  # of an interpolation: ${KEY}, ${oc.env:VARIABLE}
        raise UserError(f"config key '{getattr(error, 'full_key', '')}': {first_line(error)}") from error
    check_values(config)
    if hasattr(config, "resolve"):
        config.resolve()
    return config


def check_values(config) -> None:
    """UserError names the first value that is out of its bounds."""
    for name, field, value in _values(config):
        described = field.metadata.get("key")
        if described and (problem := described.problem(value)):
            told = textwrap.shorten(str(value), 100, placeholder=" ...")
            shown = f"{name} '{told}'" if described.choices else f"{name}={told or repr(value)}"
            raise UserError(f"{shown} {problem}")


def to_yaml(config) -> str:
    """The resolved config as YAML, as `--dry-run` prints it and a run's folder keeps it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def parse_command_line(
    schema: type[Config], description: str, argv: list[str] | None = None, planned: Sequence[str] = ()
) -> tuple[Config, argparse.Namespace]:
    """The command line every entry point shares. Returns (config, args).

    With `planned`, --dry-run --gpus N plans a start elsewhere, and what is not given is then as `planned` has it.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=describe_keys(schema), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", help="YAML file with this run's keys; a later one adds to it")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and plan, then stop")
    if planned:
        parser.add_argument(
            "--gpus", type=int, help="with --dry-run: plan for so many; what is not here, data too, is assumed"
        )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set config keys, dotted, as listed below")
    args = parser.parse_intermixed_args(argv)
    elsewhere = planned and args.gpus is not None
    if elsewhere and not args.dry_run:
        raise UserError(
            f"--gpus {args.gpus} is for --dry-run alone; a start has the processes that a launcher or run.ranks gives"
        )
    if elsewhere and args.gpus < 1:
        raise UserError(f"--gpus {args.gpus} must be at least 1")
    return load_config(schema, args.config, args.overrides, planned if elsewhere else ()), args


def describe_keys(schema: type) -> str:
    """Every key of a schema by section: type, bounds, default and meaning, as `--help` prints them."""
    sections: dict[str, list[str]] = {}
    seen: set[int] = set()
    for name, field, default in _keys(schema):
        if "[]" in name and id(field) in seen:  # another list of such sections
            continue
        seen.add(id(field))
        described = field.metadata.get("key", Key(""))
        one_of = "one of " if described.choices else ""
        facts = [_type_name(field.type)] + ([one_of + described.bounds] if described.bounds else [])
        value = "required" if _missing(default) else f"default {_shown(default)}"
        about = textwrap.fill(described.about, 112, initial_indent=6 * " ", subsequent_indent=6 * " ")
        lines = sections.setdefault(name.rpartition(".")[0], [])
        lines += [f"  {name}  ({', '.join(facts)}; {value})"] + ([about] if described.about else [])
    return "\n\n".join(f"{section or 'keys'}:\n" + "\n".join(lines) for section, lines in sections.items())


def _section(type_: Any) -> Any:
    """The dataclass of a section, or of each entry of a mapping or list of sections."""
    of = typing.get_args(type_) if typing.get_origin(type_) in (dict, list) else (type_,)
    return next((each for each in of if dataclasses.is_dataclass(each)), None)


def _is_mapping(field: dataclasses.Field) -> bool:
    return typing.get_origin(field.type) is dict


def _is_list(field: dataclasses.Field) -> bool:
    """Of sections."""
    return typing.get_origin(field.type) is list and _section(field.type) is not None


def _keys(schema: type, defaults: Any = None, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every key with its dotted name, field and default; NAME stands for the names that a mapping's user chooses."""
    defaults = schema() if defaults is None else defaults
    for field in dataclasses.fields(schema):
        name, default = prefix + field.name, getattr(defaults, field.name)
        section = _section(field.type)
        if section and _is_list(field):
            yield name, field, default
            yield from _keys(section, None, f"{name}[].")
        elif section and _is_mapping(field):
            yield from _keys(section, None, f"{name}.NAME.")
        elif section:
            yield from _keys(section, default, f"{name}.")
        else:
            yield name + (".NAME" if _is_mapping(field) else ""), field, default


def _values(config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every value of a filled config, with its dotted name and field."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{name}.")
        elif _is_list(field):
            for i, each in enumerate(value):
                yield from _values(each, f"{name}[{i}].")
        elif _is_mapping(field) and value is not None:
            for entry, each in value.items():
                if dataclasses.is_dataclass(each):
                    yield from _values(each, f"{name}.{entry}.")
                else:
                    yield f"{name}.{entry}", field, each
        else:
            yield name, field, value


@dataclasses.dataclass(frozen=True)
class _Names:
    """All dotted names of a schema: of its keys and of its sections."""

    keys: list[str]
    sections: list[str]

    @classmethod
    def of(cls, schema: type) -> "_Names":
        keys = [name for name, _, _ in _keys(schema)]
        parents = [parts[:i] for parts in (name.split(".") for name in keys) for i in range(1, len(parts))]
        return cls(keys, list(dict.fromkeys(".".join(parent) for parent in parents)))

    def near(self, wrong: str) -> str | None:
        """What may have been meant by a name that there is not; None where nothing is alike."""
        known = [*self.keys, *self.sections]
        best = max(known, key=lambda name: _likeness(wrong, name), default="")
        if _likeness(wrong, best) >= NEAR:
            return best
        leaf = wrong.rpartition(".")[2]  # the same key, in another section
        return next((name for name in self.keys if name.rpartition(".")[2] == leaf), None)


def _likeness(a: str, b: str) -> float:
    """How alike two names are, word by word, from 0 to 1."""
    words, others = (re.split(r"[._]", name) for name in (a, b))
    if len(words) < len(others):
        words, others = others, words
    alike = (max(difflib.SequenceMatcher(None, word, other).ratio() for other in others) for word in words)
    return sum(ratio for ratio in alike if ratio > 0.7) / len(words)


def _check_keys(
    given: Any, schema: type, place: str, names: _Names, prefix: str = "", known_as: str | None = None
) -> None:
    """Refuse keys that `schema` does not have, naming the one that was meant, where one is near.

    `known_as` is the prefix as `names` has it, where that differs: with NAME for what users choose.
    """
    if not isinstance(given, dict):
        raise UserError(f"{place}: '{prefix.rstrip('.')}' is a section and needs keys, got {given!r}")
    known_as = prefix if known_as is None else known_as
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in given.items():
        name = str(key)
        if name not in fields:
            near = names.near(known_as + name)
            if not near and isinstance(value, dict) and value:  # a section that there is not
                inner = f"{name}.{next(map(str, value))}"
                near = names.near(known_as + inner)
                name = inner if near else name
            if near and near.startswith(known_as):
                near = prefix + near[len(known_as) :]
            hint = f"did you mean '{near}'?" if near else f"known here: {', '.join(prefix + each for each in fields)}"
            if near == prefix + name:  # dotted in a YAML
                hint = "in YAML every dot begins a section, as in " + name.replace(".", ": {") + ": ..." + (
                    "}" * name.count("."))  # fmt: skip
            raise UserError(f"{place}: unknown config key '{prefix}{name}'; {hint}")
        if _interpolated(value):
            continue
        section = _section(fields[name].type)
        if section and _is_mapping(fields[name]):
            if not isinstance(value, dict):
                raise UserError(f"{place}: '{prefix}{name}' needs a section for each name, got {value!r}")
            for entry, keys in value.items():
                _check_keys(keys, section, place, names, f"{prefix}{name}.{entry}.", f"{known_as}{name}.NAME.")
        elif section and _is_list(fields[name]):
            if not isinstance(value, list):
                raise UserError(
                    f"{place}: '{prefix}{name}' is a list: give it whole, as in {prefix}{name}=[{{path: DIR}}]"
                )
            for i, keys in enumerate(value):
                _check_keys(keys, section, place, names, f"{prefix}{name}[{i}].", f"{known_as}{name}[].")
        elif section:
            _check_keys(value, section, place, names, f"{prefix}{name}.", f"{known_as}{name}.")
        elif not _is_of(value, fields[name].type):
            told = textwrap.shorten(_shown(value), 100, placeholder=" ...")
            bounds = fields[name].metadata.get("key", Key("")).bounds
            expected = _expected(fields[name].type) + (f"; {bounds}" if bounds else "")
            whole = isinstance(value, float) and value.is_integer() and _is_of(int(value), fields[name].type)
            written = f"; write {int(value)}" if whole else ""
            raise UserError(f"{place}: {prefix}{name}={told} must be {expected}{written}")


def _interpolated(value: Any) -> bool:
    """Whether OmegaConf finds the value elsewhere (`${...}`), or it is still to be given."""
    return isinstance(value, str) and ("${" in value or value == MISSING)


def _is_of(value: Any, type_: Any) -> bool:
    """Whether a value as YAML gives it is one of a key's type. What a text spells counts, as of `${oc.env:...}`."""
    origin, of = typing.get_origin(type_), typing.get_args(type_)
    if type_ is Any or _interpolated(value):
        return True
    if isinstance(type_, types.UnionType):
        return any(_is_of(value, each) for each in of)
    if origin is list:
        return isinstance(value, list) and all(_is_of(each, of[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(each, of[1]) for each in value.values())
    if type_ is bool:
        return isinstance(value, bool) or isinstance(value, str) and value.lower() in ("true", "false")
    if type_ in (int, float):
        number = (int,) if type_ is int else (int, float)
        return (
            isinstance(value, number)
            and not isinstance(value, bool)
            or isinstance(value, str)
            and _spells(value, type_)
        )
    if type_ is str:  # not true or false, which YAML also makes of yes, no, on and off
        return isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return value is None


def _spells(text: str, type_: type) -> bool:
    try:
        type_(text)
    except ValueError:
        return False
    return True


def _spelled_out(given: Any, schema: type) -> Any:
    """With a section for each entry of a list of sections that is a text: the value of the section's first key."""
    if not isinstance(given, dict):
        return given
    fields = {field.name: field for field in dataclasses.fields(schema)}
    spelled = dict(given)
    for name, value in given.items():
        section = _section(fields[name].type) if name in fields else None
        if section and _is_list(fields[name]) and isinstance(value, list):
            first = dataclasses.fields(section)[0].name
            spelled[name] = [{first: each} if isinstance(each, str) else each for each in value]
        elif section and not _is_mapping(fields[name]):
            spelled[name] = _spelled_out(value, section)
    return spelled


def _expected(type_: Any) -> str:
    """What a key takes, in words."""
    if typing.get_origin(type_) is dict:
        return f"a mapping of names to {_type_name(type_)}"
    return {bool: "true or false", str: "str; what YAML reads otherwise needs quotes"}.get(type_, _type_name(type_))


def _type_name(type_: Any) -> str:
    if typing.get_origin(type_) is list and (section := _section(type_)):
        return (
            f"list of paths or of sections with the keys {', '.join(each.name for each in dataclasses.fields(section))}"
        )
    if typing.get_origin(type_) is dict:  # a mapping's key is named with NAME, which has the type of its values
        type_ = typing.get_args(type_)[1]
    if isinstance(type_, types.UnionType):
        return " or ".join("null" if part is types.NoneType else _type_name(part) for part in type_.__args__)
    return type_.__name__ if isinstance(type_, type) and not typing.get_args(type_) else str(type_)


def _missing(value: Any) -> bool:
    return isinstance(value, str) and value == MISSING


def _shown(value: Any) -> str:
    """A default as YAML writes it."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def _read_override(override: str) -> dict:
    name, equals, _ = override.partition("=")
    if not equals or not all(name.split(".")):
        raise UserError(f"override '{override}' is not of the form key=value")
    try:
        return _contents(OmegaConf.from_dotlist([override]))
    except Exception as error:
        raise UserError(f"override '{override}' can't be read: {_yaml_problem(error)}") from error


def _read_yaml_chain(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict]]:
    """A file's keys behind those of its `base`; `above` are the files that named it so."""
    if path.resolve() in above:
        raise UserError(f"config file '{path}' is its own base; remove `base` from one of the files")
    layer = read_yaml(path)
    base = layer.pop("base", None)
    if base is None:
        return [(str(path), layer)]
    if not isinstance(base, str):
        raise UserError(f"config file '{path}': base={base!r} must be the path of a YAML file")
    return [*_read_yaml_chain(path.parent / base, (*above, path.resolve())), (str(path), layer)]


def read_yaml(path: Path) -> dict:
    """The keys of a config file, interpolations as they are; UserError, in one line, for what can't be read."""
    if not path.is_file():
        raise UserError(f"config file '{path}' {'is a folder; name a file' if path.is_dir() else 'does not exist'}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config file '{path}' can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file '{path}' is not a text in UTF-8, at byte {error.start}") from error
    try:
        layer = OmegaConf.load(io.StringIO(text))
    except Exception as error:
        raise UserError(f"config file '{path}' is not valid YAML: {_yaml_problem(error)}") from error
    if not isinstance(layer, DictConfig):
        raise UserError(f"config file '{path}' must hold a mapping of keys, not a list")
    if not layer:
        raise UserError(f"config file '{path}' is empty: it must hold a mapping of keys")
    return _contents(layer)


def _contents(layer: DictConfig) -> dict:
    """Without interpolations resolved, which may need keys of other files."""
    return typing.cast(dict, OmegaConf.to_container(layer))


def _yaml_problem(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = first_line(problem or error)
    return f"line {mark.line + 1}: {line}" if mark else line
