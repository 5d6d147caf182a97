"""Hash a shard set again and compare it with what it says of itself.

`python data_pipeline/verify.py SET` (a folder or a URL); exit code 2 and one line for each thing that does not hold.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout goes before an installed package

from data_pipeline.manifest import make_index, summarise  # noqa: E402
from data_pipeline.store import MARKER, Store, open_store  # noqa: E402
from megadual.data.contents import Fields, listed_files  # noqa: E402
from megadual.data.verification import compare  # noqa: E402
from megadual.errors import UserError, command  # noqa: E402


def find_problems(store: Store) -> tuple[dict, list[str]]:
    """The set's manifest, and what does not hold; UserError where there is no finished set."""
    try:
        manifest, index = store.read("manifest.json"), store.read("index.json")
    except FileNotFoundError as error:
        raise UserError(f"no finished shard set in '{store.url}': {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"manifest.json or index.json of '{store.url}' is no text: {error}") from error
    try:
        markers = store.markers()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"a {MARKER} of '{store.url}' is not valid JSON: {error}") from error
    described = Fields.parse(manifest.encode(), f"{store.url}/manifest.json")
    files = listed_files(described)
    listed = {shard["folder"] for shard in described.values["shards"]}
    problems = [f"{name}: in the manifest, but it has no {MARKER}" for name in sorted(listed - markers.keys())]
    problems += [
        f"{name}: committed, but not in the manifest; run data_pipeline/tokenize.py again"
        for name in sorted(markers.keys() - listed)
    ]
    markers = {name: marker for name, marker in markers.items() if name in listed}
    try:
        summary = summarise(markers)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"a {MARKER} of '{store.url}' is not what data_pipeline/tokenize.py writes: {error}") from error
    for part, value in summary.items():
        if described.values.get(part) != value:
            problems.append(f"manifest.json: its {part} are not what the folders' markers say")
    compared = compare(files.items(), store.sha256)
    bar = tqdm(compared, total=len(files), desc="verify", unit="file", mininterval=1)
    problems += [problem for problem in bar if problem]
    try:
        if make_index(store, markers) != index:
            problems.append("index.json: not what the folders' index.json files add up to")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        problems.append(f"index.json of a folder: {error}")
    return described.values, problems


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Hash a shard set again and compare it with its manifest.")
    parser.add_argument("set", help="folder or URL of the set")
    args = parser.parse_args(argv)
    manifest, problems = find_problems(open_store(args.set))
    if problems:
        raise UserError(f"{len(problems)} things do not hold in '{args.set}':\n  " + "\n  ".join(problems))
    files = sum(len(shard["files"]) for shard in manifest["shards"])
    print(
        f"{args.set}: {manifest['documents']} documents in {files} files of {len(manifest['shards'])} shards, "
        "all as written"
    )


if __name__ == "__main__":
    main()
