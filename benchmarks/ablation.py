"""The paper's ablation in small: which layers the two code streams should come from.

    python benchmarks/ablation.py --output runs/ablation --seeds 3 --jobs 4

Makes a corpus, trains a small SigLIP on it, then trains one tokenizer for each variant and seed from that SigLIP, all
with the same budget, several at once (tiny models leave most of a GPU idle), and measures them on held-out pairs:

- one_deep: one codebook at the deep layer, for both goals;
- one_deep_2x: the same with as many codes as both streams of `dual` have together (not in the paper);
- pixel_deep, pixel_shallow: reconstruction alone, from the deep or the shallow layer;
- dual: pixel codes from the shallow layer, semantic codes from the deep one;
- one_deep_pixels, dual_pixels: the reconstruction weighted 8 times as much, to see who pays for it (not in the paper).

Writes table.md, anew behind every run, and one JSON file per run. What is finished in the output folder, with equal
settings, is kept, so an interrupted call goes on when it is repeated. The losses are the trainer's, without LPIPS and
GAN.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from ablation_runs import PRESETS, VARIANTS, Settings, prepare, run
from tqdm import tqdm

from megadual.errors import UserError, command


def finished(path: Path, settings: dict) -> bool:
    return path.is_file() and json.loads(path.read_text())["settings"] == settings


def run_all(args: argparse.Namespace, settings: Settings) -> None:
    """Every variant and seed as a process of its own, `jobs` at a time."""
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.variants]
    settings_path = args.output / "settings.json"
    settings_path.write_text(json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
    (args.output / "logs").mkdir(exist_ok=True)

    def start(name: str, seed: int) -> str | None:
        """What went wrong, if anything."""
        if finished(args.output / f"runs/{name}-{seed}.json", dataclasses.asdict(settings)):
            return None
        arguments = ["--output", str(args.output), "--device", args.device, "--run", name, str(seed)]
        log = args.output / f"logs/{name}-{seed}.log"
        with log.open("w") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run([sys.executable, __file__, *arguments], stdout=file, stderr=file, env=environment)
        return f"{name} {seed} failed, see {log}:\n{log.read_text()[-2000:]}" if code.returncode else None

    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(start, name, seed) for name, seed in wanted]
        for done in tqdm(as_completed(runs), total=len(runs), desc="runs", unit="run", mininterval=1):
            if done.result():
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(done.result())
            (args.output / "table.md").write_text(
                table(args.output, args.variants, args.seeds, dataclasses.asdict(settings))
            )


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    """Mean ± standard deviation over seeds."""
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * mean:.{digits}f} ± {scale * deviation:.{digits}f}"


def table(output: Path, names: list[str], seeds: int, settings: dict) -> str:
    """Markdown: our figures (mean ± standard deviation over the seeds that are done) beside the paper's."""
    teacher = json.loads((output / "teacher.json").read_text())
    lines = [
        f"Measured: {len(teacher['captions'])} held-out pairs, up to {seeds} seeds; paper: So/14-384 on ImageNet.",
        "",
        "| variant | PSNR | SSIM | image→text R@1, % | text→image R@1, % | paper: PSNR | SSIM | zero-shot, % | rFID |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| teacher | – | – | {100 * teacher['image_to_text']:.1f} | {100 * teacher['text_to_image']:.1f} "
        "| – | – | 83.2 | – |",
    ]
    for name in names:
        paths = [output / f"runs/{name}-{seed}.json" for seed in range(seeds)]
        runs = [json.loads(path.read_text()) for path in paths if finished(path, settings)]
        if not runs:
            continue
        cells = [spread([r["psnr"] for r in runs], 2), spread([r["ssim"] for r in runs], 3)]
        for key in ("image_to_text", "text_to_image"):
            cells.append(spread([r[key] for r in runs], 1, 100) if key in runs[0] else "–")
        zero_shot, rfid, paper_psnr, paper_ssim = VARIANTS[name].paper
        cells += [paper_psnr, paper_ssim, zero_shot, rfid]
        lines.append(f"| {VARIANTS[name].label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for everything; git ignores runs/")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="small: one GPU; tiny: minutes on a CPU")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each takes a core")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--smoke", action="store_true", help="few images and steps, and an estimate of the whole")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), metavar="N", help=f"small: {field.default}")
    parser.add_argument("--run", nargs=2, metavar=("VARIANT", "SEED"), help="one run alone, once all is prepared")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if args.run:
        settings = Settings(**json.loads((args.output / "settings.json").read_text()))
        return run(args.run[0], int(args.run[1]), args.output, settings, device)

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    full = dataclasses.replace(PRESETS[args.preset], **{name: n for name, n in given.items() if n is not None})
    settings = full
    if args.smoke:
        settings = dataclasses.replace(full, train_images=1000, heldout_images=100, siglip_steps=40, steps=40)
    if args.seeds < 1 or args.jobs < 1:
        raise UserError(f"--seeds {args.seeds} and --jobs {args.jobs} must be at least 1")
    args.output.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    if not finished(args.output / "teacher.json", settings.shared):
        prepare(args.output, settings, device)
    prepared = time.perf_counter()
    run_all(args, settings)
    report = table(args.output, args.variants, args.seeds, dataclasses.asdict(settings))
    (args.output / "table.md").write_text(report)
    print(report)
    print(f"prepared in {prepared - begun:.0f} s, runs took {time.perf_counter() - prepared:.0f} s", flush=True)
    if args.smoke:
        teacher = json.loads((args.output / "teacher.json").read_text())
        runs = [json.loads(path.read_text())["seconds_per_step"] for path in (args.output / "runs").glob("*.json")]
        waves = -(-args.seeds * len(args.variants) // args.jobs)
        print(
            f"whole, about: SigLIP {full.siglip_steps * teacher['seconds_per_step']:.0f} s, "
            f"runs {waves * full.steps * statistics.median(runs):.0f} s, beside corpus and start-up"
        )


if __name__ == "__main__":
    main()
