"""What the pipeline costs: against a plain loop that does the same work on the same cores, and in memory.

`python benchmarks/tokenize_pipeline.py speed --images 4000` prints images/s of a plain single-process loop on one core,
of the pipeline with one worker on that core and with two workers on two, and the bytes of an image in the set.
`python benchmarks/tokenize_pipeline.py memory --size 64` prints the peak memory of driver and worker for 2,000 and
20,000 images.

Images are JPEGs, the DualToken has random weights and few channels: the cheaper the encoder, the more the pipeline's
own cost counts. On an idle machine; start-up (seconds, once) is told apart.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import SiglipConfig

from data_pipeline.config import PipelineConfig
from data_pipeline.run import tokenize
from megadual.config import load_config
from megadual.data.mds import document_writer
from megadual.streams import Document, SpecialIds
from megadual.synthetic.files import write_tar
from megadual.text import load_text_tokenizer, save_text_tokenizer, train_text_tokenizer
from megadual.vision import DualToken, DualTokenConfig, StreamConfig

BATCH = 32
CAPTION = "a photograph of something number {} in a place that many captions describe at about this length"


def write_tar_of_jpegs(path: Path, first: int, images: int, size: int) -> None:
    random = np.random.default_rng(first)
    members = []
    for i in range(first, first + images):
        blobs = Image.fromarray(random.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
        jpeg = io.BytesIO()
        blobs.resize((size, size), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=90)
        members += [(f"{i:09d}.jpg", jpeg.getvalue()), (f"{i:09d}.txt", CAPTION.format(i).encode())]
    write_tar(path, members)


def write_inputs(folder: Path, images: int, per_tar: int, size: int, dualtoken: DualToken) -> None:
    """Tars of JPEGs with captions, and both tokenizers."""
    (folder / "corpus").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        tars = [
            pool.submit(
                write_tar_of_jpegs, folder / "corpus" / f"{i:05d}.tar", first, min(per_tar, images - first), size
            )
            for i, first in enumerate(range(0, images, per_tar))
        ]
        for tar in tqdm(tars, desc="inputs", unit="tar", mininterval=1):
            tar.result()
    dualtoken.save_pretrained(folder / "dualtoken")
    save_text_tokenizer(train_text_tokenizer([CAPTION], 300), folder / "text_tokenizer")


def tiny_dualtoken(size: int) -> DualToken:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    siglip = SiglipConfig(
        vision_config={**tower, "image_size": size, "patch_size": 16},
        text_config={**tower, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0},
    )
    torch.manual_seed(0)
    config = DualTokenConfig(
        siglip=siglip.to_dict(),
        streams={
            "semantic": StreamConfig(layers=[3], feeds=["teacher"], codebook_size=4096, code_dim=8),
            "pixel": StreamConfig(layers=[2, 1], weights=[1.0, 0.6], feeds=["picture"], codebook_size=4096, code_dim=8),
        },
        decoder_latent=size // 8, decoder_in_channels=16, decoder_channels=8, decoder_multipliers=[1, 1, 1, 1],
        decoder_res_blocks=1, decoder_attention=[], decoder_norm_groups=4,
    )  # fmt: skip
    return DualToken(config)


@torch.inference_mode()
def plain_loop(folder: Path, output: Path) -> float:
    """The same rows as the pipeline's, by one loop; returns its seconds without start-up."""
    torch.set_num_threads(1)
    dualtoken = DualToken.from_pretrained(folder / "dualtoken").eval()
    tokenizer = load_text_tokenizer(folder / "text_tokenizer")
    image_id = SpecialIds.of(tokenizer).image
    grid = np.array([dualtoken.config.grid], dtype=np.uint16)
    start = time.perf_counter()
    for path in sorted((folder / "corpus").glob("*.tar")):
        with tarfile.open(path) as tar, document_writer(output / path.stem, dualtoken.config.streams) as writer:
            batch, captions = [], []  # (key, pixels) and the texts

            def write(batch=batch, captions=captions, path=path, writer=writer) -> None:
                codes = dualtoken.encode(torch.stack([pixels for _, pixels, _ in batch]), pooled=False).codes
                ids = tokenizer(captions, add_special_tokens=False, split_special_tokens=True).input_ids
                for i, (key, _, size) in enumerate(batch):
                    writer.write(
                        Document(
                            key=f"{path.stem}/{key}",
                            text_ids=np.array([image_id, *ids[i]], dtype=np.uint32),
                            codes={name: c[i].flatten(0, 1).numpy().astype(np.uint16) for name, c in codes.items()},
                            grids=grid,
                            meta={"source": str(path), "field": "txt", "format": "pair", "sizes": [size]},
                        ).row()
                    )
                batch.clear()
                captions.clear()

            for member in tar:
                key, suffix = member.name.split(".")
                data = tar.extractfile(member).read()
                if suffix == "jpg":
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    batch.append((key, dualtoken.preprocess(image), list(image.size)))
                else:
                    captions.append(data.decode())
                    if len(batch) == BATCH:
                        write()
            if batch:
                write()
    return time.perf_counter() - start


def pipeline(folder: Path, output: Path, workers: int, *more: str) -> None:
    """In this process and Ray's; prints the run's own summary and the driver's peak memory."""
    overrides = [
        f"inputs=['{folder}/corpus/*.tar']", f"output={output}", f"dualtoken={folder}/dualtoken",
        f"text_tokenizer={folder}/text_tokenizer", f"workers.count={workers}", f"encode.batch_size={BATCH}",
        "encode.shard_bytes=2097152", "workers.address=local", *more,
    ]  # fmt: skip
    tokenize(load_config(PipelineConfig, None, overrides))
    print(f"peak memory of the driver {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


def run_pinned(cores: int, *arguments: str) -> tuple[str, float]:
    """This file in another process on `cores` cores; returns what it said and its seconds, start-up included."""
    mine = sorted(os.sched_getaffinity(0))[:cores]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, mine),
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout, time.perf_counter() - start


def between(said: str, before: str, after: str) -> float:
    return float(said.split(before)[1].split(after)[0])


def measure_speed(folder: Path, images: int, size: int, repeats: int) -> None:
    write_inputs(folder, images, images // 8, size, tiny_dualtoken(size))
    print(f"{images} JPEGs of {size} px, batches of {BATCH}; load before: {os.getloadavg()[0]:.1f}")
    ratios = {1: [], 2: []}
    for repeat in range(repeats):
        said, total = run_pinned(1, "plain", str(folder), str(folder / f"plain-{repeat}"))
        plain = images / between(said, "loop took ", " s")
        print(f"plain loop, 1 core: {plain:.0f} images/s, {total:.1f} s with start-up")
        for workers in ratios:
            output = folder / f"set-{workers}-{repeat}"
            said, total = run_pinned(workers, "pipeline", str(folder), str(output), str(workers))
            rate = images / between(said, "done now in ", " s")
            ratios[workers].append(rate / plain)
            print(
                f"pipeline, {workers} workers on {workers} cores: {rate:.0f} images/s, {rate / plain:.2f} x the loop, "
                f"{total:.1f} s with start-up"
            )
    for workers, values in ratios.items():
        print(f"{workers} workers: {np.median(values):.2f} x (median of {repeats})")
    stored = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    config = json.loads((folder / "dualtoken" / "config.json").read_text())
    codes = (size // 16) ** 2 * 2 * config["depth"] * 2
    print(f"{stored / images:.0f} bytes per image in the whole set, raw codes {codes}: {stored / images / codes:.3f} x")


def measure_memory(folder: Path, size: int) -> None:
    for images, per_tar in ((2000, 1000), (20000, 1000), (20000, 20000)):
        place = folder / f"{images}-{per_tar}"
        write_inputs(place, images, per_tar, size, tiny_dualtoken(size))
        said, _ = run_pinned(2, "pipeline", str(place), str(place / "set"), "1")
        print(
            f"{images} images in tars of {per_tar}: worker {between(said, 'peak memory of a worker ', ' MB'):.0f} MB, "
            f"driver {between(said, 'peak memory of the driver ', ' MB'):.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "plain", "pipeline"])
    parser.add_argument(
        "places", nargs="*", help="of plain and pipeline, which the others call: inputs, output, workers, key=value"
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.what == "plain":
        seconds = plain_loop(Path(args.places[0]), Path(args.places[1]))
        print(f"loop took {seconds:.3f} s")
    elif args.what == "pipeline":
        pipeline(Path(args.places[0]), Path(args.places[1]), int(args.places[2]), *args.places[3:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            if args.what == "speed":
                measure_speed(Path(folder), args.images, args.size, args.repeats)
            else:
                measure_memory(Path(folder), args.size)


if __name__ == "__main__":
    main()
