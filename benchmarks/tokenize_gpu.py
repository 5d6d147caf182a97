"""What of one GPU's encoding speed is left from JPEG tars to shards.

python benchmarks/tokenize_gpu.py [--images 60000] [--workers 1 4] [--cores 16]

Writes JPEGs of 256 px with captions, then prints the images/s of the encoder alone (`FastDualToken`, images on the
GPU, released 256 px configuration with random weights) and of the whole pipeline with so many workers that share the
GPU and the cores. Beside each: the cores that were busy, start-up included, and what nvidia-smi says of the GPU.
"""

import argparse
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch
from gpu_timing import milliseconds
from tokenize_pipeline import between, run_pinned, write_inputs

from megadual.vision import DualToken
from megadual.vision.fast import FastDualToken
from megadual.vision.presets import preset

PRESET = "siglip2-so400m-256-rvq4"


class Watch:
    """Cores busy and GPU utilisation while the body runs."""

    def __enter__(self):
        self.done, self.gpu = threading.Event(), []
        self.thread = threading.Thread(target=self._sample)
        self.started, self.busy_before = time.monotonic(), self._busy()
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.cores = (self._busy() - self.busy_before) / (time.monotonic() - self.started)
        self.done.set()
        self.thread.join()

    @staticmethod
    def _busy() -> float:
        """Seconds that all cores have worked since the machine started."""
        user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + irq + soft) / 100

    def _sample(self) -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self.done.wait(1):
            self.gpu.append(float(subprocess.run(query, capture_output=True, text=True).stdout.split()[0]))


def steady_rate(output: Path, images_per_tar: int, workers: int) -> float:
    """Images/s between the first commits of all workers and the last ones, while all of them are at work."""
    commits = sorted(path.stat().st_mtime for path in output.iterdir() if path.is_dir())[workers:-workers]
    return images_per_tar * (len(commits) - 1) / (commits[-1] - commits[0])


def encode_alone(model: DualToken, batch: int) -> float:
    """Images/s of the encoder, with nothing around it."""
    images, fast = torch.randn(batch, 3, 256, 256, device="cuda").clamp(-1, 1), FastDualToken(model)
    return batch / milliseconds(lambda: fast.encode(images, pooled=False), repeats=50) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4], help="workers that share the GPU")
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = Path(folder)
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = DualToken(preset(PRESET))
        write_inputs(folder, args.images, 5 * args.batch, 256, model.eval())
        alone = encode_alone(model, args.batch)
        print(
            f"{torch.cuda.get_device_name()}, batches of {args.batch}; encode alone: {alone:.0f} images/s", flush=True
        )
        del model
        torch.cuda.empty_cache()
        for workers in args.workers:
            each = args.cores // workers
            with Watch() as watch:
                said, total = run_pinned(
                    args.cores, "pipeline", str(folder),
                    str(folder / f"set-{workers}"), str(workers), f"workers.gpus={1 / workers}",
                    f"workers.cpus={each}", f"workers.decode_threads={max(1, each - 1)}",
                    f"encode.batch_size={args.batch}",
                )  # fmt: skip
            whole = args.images / between(said, "done now in ", " s")
            rate = steady_rate(folder / f"set-{workers}", 5 * args.batch, workers)
            busy = statistics.mean(share for share in watch.gpu if share)
            print(
                f"{workers} workers: {rate:.0f} images/s, {rate / alone:.2f} of the encoder alone; {whole:.0f} from "
                f"the first worker's start to the last one's end, {total:.0f} s with start-up; {watch.cores:.1f} cores "
                f"busy, GPU {busy:.0f} % where it was in use; a worker's peak "
                f"{between(said, 'peak memory of a worker ', ' MB')} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
