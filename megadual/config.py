"""Run configurations: dataclasses, filled strictly from YAML and dotted `key=value` overrides."""

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megadual.errors import UserError


def _leaves(schema: type, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            names += _leaves(field.type, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def _check_keys(given: Any, schema: type, place: str, prefix: str = "") -> None:
    """Refuse keys that `schema` does not have, naming the nearest one that it has."""
    if not isinstance(given, (dict, DictConfig)):
        raise UserError(f"{place}: '{prefix.rstrip('.')}' is a section and needs keys, got {given!r}")
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in fields:
            known = _leaves(schema, prefix)
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            raise UserError(f"{place}: unknown config key '{name}'; {hint}")
        if dataclasses.is_dataclass(fields[key].type):
            _check_keys(value, fields[key].type, place, f"{name}.")


def load_config(schema: type, path: str | Path | None = None, overrides: list[str] = ()):
    """Build a `schema` dataclass from its defaults, then the YAML at `path`, then `overrides`.

    A YAML file may name another one to start from, relative to itself, under `base`.
    Unknown keys and values of the wrong type raise UserError.
    """
    merged = OmegaConf.structured(schema)
    layers = _read_yaml_chain(Path(path)) if path is not None else []
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override '{override}' is not of the form key=value")
        try:
            layers.append(("command line", OmegaConf.from_dotlist([override])))
        except Exception as error:
            raise UserError(f"override '{override}' can't be read: {error}") from error
    for place, layer in layers:
        _check_keys(layer, schema, place)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise UserError(f"{place}: {str(error).splitlines()[0]} ({getattr(error, 'full_key', '')})") from error
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "")
        raise UserError(f"config key '{key}' has no value; give it in the YAML or as {key}=...") from error


def _read_yaml_chain(path: Path) -> list[tuple[str, DictConfig]]:
    if not path.is_file():
        raise UserError(f"config file '{path}' does not exist")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"config file '{path}' is not valid YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise UserError(f"config file '{path}' must hold a mapping of keys, not a list")
    base = layer.pop("base", None)
    return (_read_yaml_chain(path.parent / base) if base else []) + [(str(path), layer)]


def to_yaml(config) -> str:
    """The resolved config as YAML, as `--dry-run` prints it and a run's folder keeps it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def parse_command_line(schema: type, description: str, argv: list[str] | None = None):
    """The command line every entry point shares. Returns (config, args)."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="keys that can be overridden: " + ", ".join(_leaves(schema)),
    )
    parser.add_argument("--config", help="YAML file with this run's keys")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and plan, then stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override config keys, dotted")
    args = parser.parse_intermixed_args(argv)
    return load_config(schema, args.config, args.overrides), args
