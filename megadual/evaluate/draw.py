"""Pictures of a benchmark's prompts, where its own scorer looks for them.

`python -m megadual.evaluate draw --benchmark geneval --prompts evaluation_metadata.jsonl --model DIR --output OUT`

Image k of prompt i comes from the seed `--seed` + i n + k, n images a prompt, and prompts are drawn in the same batches
whoever draws them: so the pictures are the same for any number of workers, and after any number of interruptions.
OUT/record.json says what they were made of. On several nodes OUT and DIR lie on a disk that all of them see.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import ray
import torch
from PIL import Image
from tqdm import tqdm

from megadual.cluster import WorkerPool, connect, worker_count
from megadual.errors import UserError
from megadual.evaluate.benchmarks import BENCHMARKS, JPEG_QUALITY, Prompt, read_prompts
from megadual.evaluate.record import file_sha256, model_record, now, software, write_json
from megadual.hf.folder import open_folder

RECORD, PARTIAL = "record.json", ".partial"


@dataclass(frozen=True)
class Sampling:
    """How images are sampled; the seed is that of the first prompt's first image."""

    cfg_scale: float = 3.0
    temperature: float = 1.0
    top_k: int = 900
    top_p: float = 0.96
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Prompts that are drawn together; of each the paths of its pictures, which are below the output."""

    first: int  # prompt
    texts: list[str]
    pictures: list[list[str]]
    beside: dict[str, str]  # text files that the scorer reads: path -> contents
    per_prompt: int

    def __str__(self) -> str:
        return f"prompts {self.first} to {self.first + len(self.texts) - 1}"

    @property
    def images(self) -> int:
        return len(self.texts) * self.per_prompt

    def done(self, output: Path) -> bool:
        """Whether all its files are there."""
        paths = [*self.beside, *(path for pictures in self.pictures for path in pictures)]
        return all((output / path).is_file() for path in paths)


@dataclass
class Workers:
    """How the work is spread (megadual/cluster.py)."""

    address: str | None = None
    count: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    attempts: int = 3
    object_store_mb: int = 100


def make_batches(name: str, prompts: list[Prompt], per_prompt: int, size: int, model_name: str) -> list[Batch]:
    """All of a benchmark's batches, of at most `size` images each; they depend on nothing else."""
    benchmark = BENCHMARKS[name]
    folder = Path(benchmark.folder.format(model=model_name))
    together, batches = max(1, size // per_prompt), []
    for start in range(0, len(prompts), together):
        some = prompts[start : start + together]
        beside = dict(benchmark.beside(prompt) for prompt in some) if benchmark.beside else {}
        batches.append(
            Batch(
                start,
                [prompt.text for prompt in some],
                [[str(folder / path) for path in benchmark.pictures(prompt, per_prompt)] for prompt in some],
                {str(folder / path): text for path, text in beside.items()},
                per_prompt,
            )
        )
    paths = [path for batch in batches for pictures in batch.pictures for path in pictures]
    if len(set(paths)) < len(paths) or any(".." in Path(path).parts or path.startswith("/") for path in paths):
        raise UserError(f"--prompts: two prompts of {name} would have the same picture, or one would lie elsewhere")
    return batches


def tiles(images: list[Image.Image]) -> Image.Image:
    """One picture of up to four images, in rows of two."""
    width, height = images[0].size
    columns = min(2, len(images))
    picture = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for i, image in enumerate(images):
        picture.paste(image, (i % columns * width, i // columns * height))
    return picture


class Drawer:
    """Holds the model and draws whole batches; a Ray actor, or used directly."""

    def __init__(
        self, model: str, output: str, sampling: Sampling, device: str | None = None, threads: int | None = None
    ):
        if threads:
            torch.set_num_threads(threads)
        self.model, self.output, self.sampling = open_folder(model, device), Path(output), sampling
        on_gpu = self.model.device.type == "cuda"
        self.device = torch.cuda.get_device_name(self.model.device) if on_gpu else "cpu"

    def draw(self, batch: Batch) -> Iterator[str]:
        """Draw a batch and write what is missing of it; then yield the device's name."""
        options = asdict(self.sampling)
        seed = options.pop("seed") + batch.first * batch.per_prompt
        images = self.model.draw(batch.texts, n=batch.per_prompt, seed=seed, **options)
        for path, text in batch.beside.items():
            self._write(path, lambda partial, text=text: partial.write_text(text))
        for i, paths in enumerate(batch.pictures):
            of_prompt = images[i * batch.per_prompt : (i + 1) * batch.per_prompt]
            pictures = of_prompt if len(paths) == len(of_prompt) else [tiles(of_prompt)]
            for path, picture in zip(paths, pictures, strict=True):
                options = {"quality": JPEG_QUALITY} if path.endswith(".jpeg") else {}
                self._write(path, lambda partial, picture=picture, options=options: picture.save(partial, **options))
        yield self.device

    def _write(self, path: str, write) -> None:
        """The file appears when it is whole, and no other is ever in the scorer's folder."""
        final = self.output / path
        if final.is_file():
            return
        partial = self.output / PARTIAL / f"{uuid4().hex}{final.suffix}"
        for folder in (partial.parent, final.parent):
            folder.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, final)


class Board:
    """The bar, and which devices drew."""

    def __init__(self, todo: list[Batch], done: int):
        self.failed, self.devices, self.images = 0, set(), 0
        self.bar = tqdm(
            total=sum(batch.images for batch in todo) + done, initial=done, desc="draw", unit="image",
            mininterval=1 if sys.stderr.isatty() else 10,
        )  # fmt: skip

    def start(self) -> None: ...

    def restart(self, task: Batch) -> None: ...

    def finish(self, task: Batch) -> None: ...

    def update(self, task: Batch, progress: str) -> None:
        self.devices.add(progress)
        self.images += task.images
        self.bar.update(task.images)

    def message(self, message: str) -> None:
        tqdm.write(message, file=sys.stderr)


def draw_on_ray(
    workers: Workers, gpus: float | None, todo: list[Batch], board: Board, model: str, output: str, sampling: Sampling
) -> dict[str, str]:
    """Draw on Ray's workers; returns the batches given up, with the last error of each. `gpus` of a worker, None: one
    where the cluster has any."""
    started = connect(workers)
    try:
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        workers.gpus = float(has_gpus) if gpus is None else gpus
        worker = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(Drawer)
        arguments = (model, output, sampling, "cuda" if workers.gpus else "cpu", max(1, int(workers.cpus)))
        pool = WorkerPool(
            workers,
            new_worker=lambda: worker.remote(*arguments),
            begin=lambda actor, batch: actor.draw.options(num_returns="streaming").remote(batch),
            todo=todo,
            board=board,
            can_grow=not started,
        )
        try:
            for _ in range(worker_count(workers, len(todo), can_grow=not started)):
                pool.start_worker()
            while pool.unfinished:
                pool.take_answers()
        finally:
            pool.close()
        return pool.given_up
    finally:
        if started:
            ray.shutdown()


def open_record(output: Path, record: dict) -> dict:
    """The record of this output so far, its own where there is none; UserError where it is of something else."""
    path = output / RECORD
    if not path.is_file():
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"--output '{output}' holds other files and no {RECORD}; give a new folder")
        return record | {"starts": []}
    kept = json.loads(path.read_text())
    for name, value in record.items():
        if name in ("model", "prompts"):  # wherever they lie
            same = kept.get(name, {}).get("sha256") == value["sha256"]
        else:
            same = kept.get(name) == value
        if not same:
            raise UserError(
                f"--output '{output}' was drawn with another {name}: {kept.get(name)}, now {value}; give a new folder"
            )
    return kept


def draw(
    benchmark: str,
    prompts_path: Path,
    model: Path,
    output: Path,
    sampling: Sampling,
    per_prompt: int | None = None,
    batch: int = 32,
    name: str | None = None,
    workers: Workers | None = None,
    gpus: float | None = None,
    device: str | None = None,
) -> dict:
    """Draw what is missing of a benchmark's pictures; returns the record. Without `workers` in this process."""
    layout = BENCHMARKS[benchmark]
    per_prompt = per_prompt or layout.per_prompt
    if layout.tiled and per_prompt > 4:
        raise UserError(f"--images {per_prompt}: {benchmark} has at most 4 images of a prompt in one picture")
    prompts = read_prompts(benchmark, prompts_path)
    name = name or model.resolve().name
    batches = make_batches(benchmark, prompts, per_prompt, batch, name)
    suffix = Path(batches[0].pictures[0][0]).suffix
    record = open_record(
        output,
        {
            "benchmark": benchmark,
            "prompts": {"path": str(prompts_path), "sha256": file_sha256(prompts_path), "count": len(prompts)},
            "images_per_prompt": per_prompt,
            "pictures": layout.folder.format(model=name),
            "format": f"JPEG, quality {JPEG_QUALITY}" if suffix == ".jpeg" else "PNG",
            "sampling": asdict(sampling),
            "batch": batch,
            "model": model_record(model),
        },
    )
    todo = [each for each in batches if not each.done(output)]
    start = {"time": now(), "software": software()}
    record |= {"complete": not todo, "starts": [*record["starts"], start] if todo else record["starts"]}
    write_json(output / RECORD, record)
    if not todo:
        return record
    board, begun = Board(todo, sum(each.images for each in batches) - sum(each.images for each in todo)), time.time()
    given_up: dict[str, str] = {}
    try:
        if workers:
            given_up = draw_on_ray(workers, gpus, todo, board, str(model.resolve()), str(output.resolve()), sampling)
        else:
            drawer = Drawer(str(model), str(output), sampling, device)
            for each in todo:
                for progress in drawer.draw(each):
                    board.update(each, progress)
    finally:
        board.bar.close()
        start |= {"devices": sorted(board.devices), "images": board.images, "seconds": round(time.time() - begun, 1)}
        record["complete"] = all(each.done(output) for each in batches)
        write_json(output / RECORD, record)
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
    if given_up:
        reasons = "".join(f"\n  {task}: {error}" for task, error in given_up.items())
        raise UserError(f"{len(given_up)} of {len(todo)} batches were not drawn; run again to go on:{reasons}")
    return record


def add_sampling(parser: argparse.ArgumentParser) -> None:
    for field, default in asdict(Sampling()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(default), default=default)


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(**{field: getattr(args, field) for field in asdict(Sampling())})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--benchmark", required=True, choices=list(BENCHMARKS))
    parser.add_argument("--prompts", required=True, type=Path, help="the benchmark's own file or folder of prompts")
    parser.add_argument("--model", required=True, type=Path, help="exported folder")
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures and their record")
    parser.add_argument("--images", type=int, help="images of each prompt (default: as the benchmark has it)")
    parser.add_argument("--name", help="the model's, where the benchmark has a folder of it (default: the folder's)")
    parser.add_argument("--batch", type=int, default=32, help="images drawn at once (default: 32)")
    add_sampling(parser)
    spread = parser.add_argument_group("workers")
    spread.add_argument("--workers", type=int, help="default: as many as there is room for; 0: draw in this process")
    spread.add_argument("--cpus", type=float, default=1.0, help="CPU cores of one worker (default: 1)")
    spread.add_argument("--gpus", type=float, help="GPUs of one worker (default: 1 where the cluster has any)")
    spread.add_argument(
        "--address", help="of a Ray cluster; local starts one (default: a running one, else starts one)"
    )
    parser.add_argument("--device", help="with --workers 0 (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> None:
    for option, least in (("images", 1), ("batch", 1), ("workers", 0)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise UserError(f"--{option} {value} must be at least {least}")
    workers = None if args.workers == 0 else Workers(args.address, args.workers or 0, args.cpus)
    record = draw(
        args.benchmark, args.prompts, args.model, args.output, sampling_of(args), args.images, args.batch, args.name,
        workers, args.gpus, args.device,
    )  # fmt: skip
    images = record["prompts"]["count"] * record["images_per_prompt"]
    print(f"{images} images of {record['prompts']['count']} prompts in {args.output / record['pictures']}")
