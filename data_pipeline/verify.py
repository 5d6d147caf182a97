"""Hash a shard set again and compare it with what it says of itself.

`python data_pipeline/verify.py SET` (a folder or a URL); exit code 2 and one line for each thing that does not hold.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout goes before an installed package

from data_pipeline.manifest import make_index, summarise  # noqa: E402
from data_pipeline.store import MARKER, Store, open_store  # noqa: E402
from megadual.errors import UserError, command  # noqa: E402


def find_problems(store: Store, threads: int = 4) -> tuple[dict, list[str]]:
    """The set's manifest, and what does not hold; UserError where there is no finished set."""
    try:
        manifest, index = json.loads(store.read("manifest.json")), store.read("index.json")
    except FileNotFoundError as error:
        raise UserError(f"no finished shard set in '{store.url}': {error}") from error
    except ValueError as error:
        raise UserError(f"'{store.url}/manifest.json' is not JSON: {error}") from error
    markers = store.markers()
    listed = {shard["folder"]: shard for shard in manifest["shards"]}
    problems = [f"{name}: in the manifest, but it has no {MARKER}" for name in sorted(listed.keys() - markers.keys())]
    problems += [
        f"{name}: committed, but not in the manifest; run data_pipeline/tokenize.py again"
        for name in sorted(markers.keys() - listed.keys())
    ]
    markers = {name: marker for name, marker in markers.items() if name in listed}
    for part, value in summarise(markers).items():
        if manifest.get(part) != value:
            problems.append(f"manifest.json: its {part} are not what the folders' markers say")
    files = [(f"{name}/{file['file']}", file["sha256"]) for name, shard in listed.items() for file in shard["files"]]

    def compare(file: tuple[str, str]) -> str | None:
        name, expected = file
        try:
            found = store.sha256(name)
        except FileNotFoundError:
            return f"{name}: does not exist"
        return None if found == expected else f"{name}: sha256 {found[:16]}, its marker says {expected[:16]}"

    with ThreadPoolExecutor(threads) as pool:
        bar = tqdm(pool.map(compare, files), total=len(files), desc="verify", unit="file", mininterval=1)
        problems += [problem for problem in bar if problem]
    try:
        if make_index(store, markers) != index:
            problems.append("index.json: not what the folders' index.json files add up to")
    except (FileNotFoundError, ValueError) as error:
        problems.append(f"index.json of a folder: {error}")
    return manifest, problems


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
