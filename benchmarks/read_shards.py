"""How fast one core reads shard sets as the trainer does, and how full its rows are.

python benchmarks/read_shards.py [--shards ROOT ...] [--seq-len 4096] [--seconds 10] [--from-store]

Without --shards: random pairs of 256 positions with 4 codes a stream and 20 to 60 text tokens, in a temporary folder;
then conversations of two to five turns, edits and pairs of three captions, with texts as long.
Prints documents a second of one core's time, from the files to collated tensors, warm, and the share of positions
that is not padding over the first epoch. Values are compared with the streams' codebooks, as in training.
--from-store reads each set again as one at a URL (file://), through an empty cache, beside it: what a store's sets cost
beyond the store's own time.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from megadual.data.cache import Cache
from megadual.data.dataset import PackedDataset
from megadual.data.source import Source
from megadual.errors import command
from megadual.streams import Marks, Stream
from megadual.testing.shards import SPECIAL, random_conversations, random_documents, write_shard_set
from megadual.text import load_text_tokenizer
from megadual.train.config import SetConfig

STREAMS = [Stream(name, depth=4, codebook_size=16384, code_dim=32) for name in ("semantic", "pixel")]


def measure(roots: list[str], marks: Marks, seq_len: int, seconds: float, cache: Cache | None = None) -> str:
    """One line of figures of the sets at `roots`."""
    opened = time.process_time()
    sources = [Source.open(SetConfig(root), None, STREAMS if SPECIAL is marks else None, cache) for root in roots]
    opened = time.process_time() - opened
    data = PackedDataset(sources, marks, seq_len, 1, 1, 0)
    packed = time.process_time()
    rows = 0
    while len(data.rows.sets[0].ends) < data.rows.sets[0].windows:  # packs the first epoch
        data.rows[rows]
        rows = data.rows.sets[0].ends[-1]
    packed = time.process_time() - packed
    documents = step = 0
    wall = time.perf_counter()
    data.step(step)
    wall = time.perf_counter() - wall
    begun = time.process_time()
    while (spent := time.process_time() - begun) < seconds:
        documents += sum(len(batch.lengths) for batch in data.step(step))
        step += 1
    held = sum(len(source.documents) for source in sources)
    return (
        f"{held:,} documents, {data.dropped} longer than a row, opened in {opened:.2f} s; packed in {packed:.2f} s; "
        f"rows of {seq_len}: fill {data.fill:.4f}; the first after {wall:.2f} s; {documents / spent:,.0f} documents "
        f"({step * seq_len / spent:,.0f} positions) a second of one core"
    )


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="*", metavar="ROOT", help="shard sets; random documents where not given")
    parser.add_argument("--text-tokenizer", help="the sets' text tokenizer; needed with --shards")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--from-store", action="store_true", help="read each set through a cache, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:

        def show(name: str, roots: list[str], marks: Marks) -> None:
            print(f"{name}: {measure(roots, marks, args.seq_len, args.seconds)}", flush=True)
            if args.from_store:
                urls = [root if "://" in root else f"file://{Path(root).resolve()}" for root in roots]
                figures = measure(urls, marks, args.seq_len, args.seconds, Cache(Path(folder) / f"{name}.cache"))
                print(f"{name}, from a store: {figures}", flush=True)

        if args.shards:
            show("sets", args.shards, Marks.of(load_text_tokenizer(args.text_tokenizer)))
            return
        documents = random_documents(8000, grid=(16, 16), streams=STREAMS, caption=(20, 60))
        talks = random_conversations(8000, grid=(16, 16), streams=STREAMS, text=(20, 60))
        for name, each in (("pairs", documents), ("conversations", talks)):
            show(name, [str(write_shard_set(Path(folder) / name, each))], SPECIAL)


if __name__ == "__main__":
    main()
