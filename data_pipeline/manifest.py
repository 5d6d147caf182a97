"""What a shard set is: its identity, and the files at its root that describe it.

The root's files are derived from the folders alone, so making them again changes no byte.
"""

import json
import re
from collections import Counter
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from data_pipeline.config import PipelineConfig
from data_pipeline.store import Store
from data_pipeline.writer import QUARANTINE, quarantine_line
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
    tokenizer = load_text_tokenizer(config.text_tokenizer)
    SpecialIds.of(tokenizer)
    identity = {
        "dualtoken": books.fingerprint,
        "text_tokenizer": fingerprint(tokenizer),
        "recipe": config.recipe(),
    }
    dualtoken = {
        "fingerprint": books.fingerprint,
        "streams": [asdict(stream) for stream in books.streams],
        "grid": list(books.grid),
        "path": config.dualtoken,
    }
    text_tokenizer = {"fingerprint": identity["text_tokenizer"], "path": config.text_tokenizer}
    return identity, {"dualtoken": dualtoken, "text_tokenizer": text_tokenizer, "config": identity["recipe"]}


def check_identity(output: str, markers: dict[str, dict], identity: dict) -> None:
    """Refuse to add to a set that was made with other tokenizers or another recipe."""
    for name, marker in markers.items():
        made = marker["identity"]
        for part in ("dualtoken", "text_tokenizer"):
            if made[part] != identity[part]:
                raise UserError(
                    f"'{output}' holds shards made with {part} {made[part][:16]} ({name}), this run has {part} "
                    f"{identity[part][:16]}; give the same {part} or another output"
                )
        precision = identity["recipe"]["precision"]
        known = made["recipe"]["precision"]
        if known != precision:
            raise UserError(
                f"'{output}' holds shards encoded in {known} ({name}), this run would encode in {precision}; start "
                f"it with workers.gpus{'=0' if known == 'fp32' else ' above 0'}, or give another output"
            )
        for section in ("read", "filters", "encode"):
            for key, value in identity["recipe"][section].items():
                if made["recipe"][section].get(key, value) != value:  # earlier versions lack some
                    raise UserError(
                        f"'{output}' holds shards made with {section}.{key}={made['recipe'][section].get(key)} "
                        f"({name}), this run has {value}; give the same value or another output"
                    )


def write_quarantine(store: Store, markers: dict[str, dict], failed: dict[str, str]) -> None:
    """quarantine.jsonl: the key and reason of every unusable sample, and of every input shard given up."""
    lists = (store.read(f"{name}/{QUARANTINE}") for name, marker in markers.items() if marker["quarantined"])
    store.replace("quarantine.jsonl", chain(lists, (quarantine_line(url, reason) for url, reason in failed.items())))


def commonest_reason(store: Store, markers: dict[str, dict]) -> str:
    """Why most of the unusable samples are so, in words: 58 times "no image: ...".

    Reasons that differ in nothing but names and numbers are counted together, and the first of them is told.
    """
    counts: Counter = Counter()
    first: dict[str, str] = {}
    for name, marker in markers.items():
        for line in store.read(f"{name}/{QUARANTINE}").splitlines() if marker["quarantined"] else []:
            reason = json.loads(line)["reason"]
            pattern = re.sub(r"'[^']*'|\d+", "_", reason)
            counts[pattern] += 1
            first.setdefault(pattern, reason)
    pattern, count = counts.most_common(1)[0]
    times = "once" if count == 1 else f"{count} times"
    return f'{times} "{first[pattern]}"'


def make_index(store: Store, markers: dict[str, dict]) -> str:
    """The root's index.json, with which a plain StreamingDataset opens the set."""
    files = []
    for name in markers:
        for file in json.loads(store.read(f"{name}/index.json"))["shards"]:
            file["raw_data"]["basename"] = f"{name}/{file['raw_data']['basename']}"
            files.append(file)
    return json.dumps({"version": 2, "shards": files}, sort_keys=True)


def summarise(markers: dict[str, dict]) -> dict:
    """The manifest's counts and shards."""
    totals = {count: sum(marker[count] for marker in markers.values()) for count in COUNTS}
    for reasons in ("left_out", "left_out_images", "left_out_captions"):
        totals[reasons] = dict(
            sorted(sum((Counter(marker[reasons]) for marker in markers.values()), Counter()).items())
        )
    shards = [{key: value for key, value in marker.items() if key != "identity"} for marker in markers.values()]
    return {**totals, "shards": shards}


def write_manifest(store: Store, markers: dict[str, dict], failed: dict[str, str], description: dict) -> dict:
    """index.json and then manifest.json, which makes a set finished and is returned."""
    store.replace("index.json", [make_index(store, markers)])
    manifest = {"format": 1, **summarise(markers), "failed_inputs": failed, **description}
    store.replace("manifest.json", [json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"])
    return manifest
