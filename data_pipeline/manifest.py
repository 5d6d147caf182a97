"""What a shard set is: its identity, and the files at its root that describe it.

The root's files are derived from the folders' markers alone, so making them again changes no byte.
"""

import json
import os
from collections import Counter
from pathlib import Path

from data_pipeline.config import PipelineConfig
from data_pipeline.writer import MARKER, QUARANTINE, TEMPORARY, read_marker, sync
from megadual.errors import UserError
from megadual.streams import SpecialIds
from megadual.text import fingerprint, load_text_tokenizer
from megadual.vision import read_codebooks

COUNTS = ("samples", "documents", "images", "positions", "text_ids", "quarantined")


def identify(config: PipelineConfig) -> tuple[dict, dict]:
    """(identity, description) of the set that `config` makes.

    The identity is what all its shards must share: the fingerprints of both tokenizers and the recipe. The
    description adds the tokenizers' folders and shapes, for the manifest.
    """
    if not Path(config.dualtoken).is_dir():
        raise UserError(f"dualtoken: folder '{config.dualtoken}' does not exist")
    try:
        books = read_codebooks(config.dualtoken)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"dualtoken: no DualToken in '{config.dualtoken}': {error}") from error
    size, dim = books["semantic"].shape
    if max(len(books["semantic"]), len(books["pixel"])) > 1 << 16:
        raise UserError(f"dualtoken: codebooks of {size} codes; a shard's uint16 columns hold at most {1 << 16}")
    tokenizer = load_text_tokenizer(config.text_tokenizer)
    SpecialIds.of(tokenizer)
    identity = {
        "dualtoken": books["fingerprint"],
        "text_tokenizer": fingerprint(tokenizer),
        "recipe": config.recipe(),
    }
    dualtoken = {
        "fingerprint": books["fingerprint"],
        "depth": books["depth"],
        "grid": list(books["grid"]),
        "codebook_size": size,
        "path": config.dualtoken,
    }
    text_tokenizer = {"fingerprint": identity["text_tokenizer"], "path": config.text_tokenizer}
    return identity, {"dualtoken": dualtoken, "text_tokenizer": text_tokenizer, "config": identity["recipe"]}


def read_markers(output: Path) -> dict[str, dict]:
    """The markers of a set's committed folders by name."""
    return {path.parent.name: read_marker(path.parent) for path in sorted(output.glob(f"*/{MARKER}"))}


def check_identity(output: Path, markers: dict[str, dict], identity: dict) -> None:
    """Refuse to add to a set that was made with other tokenizers or another recipe."""
    for name, marker in markers.items():
        made = marker["identity"]
        for part in ("dualtoken", "text_tokenizer"):
            if made[part] != identity[part]:
                raise UserError(
                    f"'{output}' holds shards made with {part} {made[part][:16]} ({name}), this run has {part} "
                    f"{identity[part][:16]}; give the same {part} or another output"
                )
        for section, values in identity["recipe"].items():
            for key, value in values.items():
                if made["recipe"][section].get(key) != value:
                    raise UserError(
                        f"'{output}' holds shards made with {section}.{key}={made['recipe'][section].get(key)} "
                        f"({name}), this run has {value}; give the same value or another output"
                    )


def _replace(path: Path, text: str) -> None:
    temporary = path.parent / TEMPORARY / path.name
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def write_quarantine(output: Path, markers: dict[str, dict]) -> None:
    """quarantine.jsonl: the key and reason of every unusable sample."""
    lists = [(output / name / QUARANTINE).read_text(encoding="utf-8") for name in markers]
    _replace(output / "quarantine.jsonl", "".join(lists))


def write_manifest(output: Path, markers: dict[str, dict], description: dict) -> dict:
    """index.json, with which a plain StreamingDataset opens the set, and manifest.json, which is returned."""
    files = []
    for name in markers:
        for file in json.loads((output / name / "index.json").read_text())["shards"]:
            file["raw_data"]["basename"] = f"{name}/{file['raw_data']['basename']}"
            files.append(file)
    _replace(output / "index.json", json.dumps({"version": 2, "shards": files}, sort_keys=True))

    left_out = sum((Counter(marker["left_out"]) for marker in markers.values()), Counter())
    manifest = {
        "format": 1,
        **{count: sum(marker[count] for marker in markers.values()) for count in COUNTS},
        "left_out": dict(sorted(left_out.items())),
        "shards": [{key: value for key, value in marker.items() if key != "identity"} for marker in markers.values()],
        **description,
    }
    _replace(output / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    sync(output)
    return manifest
