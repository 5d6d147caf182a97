"""Speed of the DualToken tokenizer on one GPU, beside a plain PyTorch version of the same computation.

python benchmarks/tokenizer.py [--config 384_rvq8|256_rvq4] [--batch 128] [--output result.json]

Random weights, images on the GPU, bf16 with fp32 code search, medians of CUDA-event times. "plain" is the same model
in bf16 on transformers' SigLIP layers, PyTorch's attention choice and operations, eager. Multiply-adds count as two.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from gpu_timing import milliseconds
from torch import Tensor
from torch.nn import functional as F

from megadual.vision import DualToken
from megadual.vision.config import DualTokenConfig
from megadual.vision.fast import FastDualToken
from megadual.vision.presets import preset
from megadual.vision.quantizer import plain_nearest_code, residual_codes
from megadual.vision.tokenizer import hidden_states

CONFIGS = {"384_rvq8": "siglip2-so400m-384-rvq8", "256_rvq4": "siglip2-so400m-256-rvq4"}
GIB = 2**30


def peak_gib(function) -> float:
    """Peak of all memory allocated while it runs, weights and inputs included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / GIB


def product_ceiling(size: int = 8192) -> float:
    """TFLOP/s of a bf16 matrix product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b) / 1e9


def encode_flops(config: DualTokenConfig) -> int:
    """Of the matrix products and attentions that the codes of one image take."""
    size, mlp, N = config.hidden_size, config.vision["intermediate_size"], config.grid[0] * config.grid[1]
    layer = N * (8 * size * size + 4 * size * mlp) + 4 * N * N * size
    flops = N * 2 * size * 3 * config.vision["patch_size"] ** 2 + config.deepest * layer
    for stream in config.streams.values():
        prequant = N * 2 * size * (3 * size + stream.code_dim) + 4 * N * N * size
        flops += len(stream.layers) * prequant + stream.depth * N * 2 * stream.codebook_size * stream.code_dim
    return flops


def random_images(config: DualTokenConfig, count: int, seed: int) -> Tensor:
    """Smooth random colour fields with noise: positions differ as they do in pictures."""
    generator = torch.Generator("cuda").manual_seed(seed)
    coarse, fine = (
        F.interpolate(torch.rand(count, 3, side, side, device="cuda", generator=generator), config.image_size)
        for side in (6, config.image_size // 2)
    )
    return (coarse + fine - 1).contiguous()


def build(config: DualTokenConfig) -> DualToken:
    """Random fp32 weights on the GPU; codebooks of the size of what they have to code."""
    config.siglip["text_config"].update(num_hidden_layers=1, vocab_size=64)  # plays no part here
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = DualToken(config).eval().requires_grad_(False)
    for stream, x_MC in vectors(model, random_images(config, 16, seed=0)).items():
        K, C = model.codebook(stream).shape
        shrink = torch.rand(K, 1, device="cuda") ** 2  # residuals of the deeper depths are small
        codes_KC = x_MC.mean(0) + x_MC.std(0) * torch.randn(K, C, device="cuda")
        model.codebook(stream).copy_(codes_KC * shrink)
    return model


@torch.no_grad()
def vectors(model: DualToken, images: Tensor) -> dict[str, Tensor]:
    """What each stream's quantiser gets, (M, C) fp32, by the plain path."""
    states = hidden_states(model.siglip_model.vision_model, images, model.config.deepest)
    return {name: model.read(name, states).flatten(0, 1).float() for name in model.config.streams}


def plain_residual_codes(x_MC: Tensor, codebook_KC: Tensor, depth: int) -> Tensor:
    codes = []
    for _ in range(depth):
        codes.append(plain_nearest_code(x_MC, codebook_KC))
        x_MC = x_MC - codebook_KC[codes[-1]]
    return torch.stack(codes, dim=1)


def plain_encode(model: DualToken, images: Tensor, codebooks: dict[str, Tensor]) -> dict[str, Tensor]:
    streams = model.config.streams
    return {
        name: plain_residual_codes(x, codebooks[name], streams[name].depth)
        for name, x in vectors(model, images).items()
    }


def agreement(codes: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, list[float]]:
    """Share of equal codes per stream: at depth 0, over all depths."""
    equal = {stream: (codes[stream] == reference[stream]).float() for stream in reference}
    return {stream: [same[..., 0].mean().item(), same.mean().item()] for stream, same in equal.items()}


def worst_excess(x_MC: Tensor, codebook_KC: Tensor, codes_MD: Tensor) -> float:
    """Largest fp64 squared distance beyond the nearest code's, as a share of |x|^2 + |c|^2, on the codes' own path."""
    worst = 0.0
    for codes_M in codes_MD.T:
        for x, chosen in zip(x_MC.split(2048), codes_M.split(2048), strict=True):
            distances = torch.cdist(x.double(), codebook_KC.double()).square()
            excess = distances.gather(1, chosen[:, None])[:, 0] - distances.amin(1)
            size = x.double().square().sum(1) + codebook_KC[chosen].double().square().sum(1)
            worst = max(worst, (excess / size).max().item())
        x_MC = x_MC - codebook_KC[codes_M]
    return worst


def measure(config: DualTokenConfig, batch: int, decode_batch: int) -> dict:
    model = build(config)
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    result |= {"batch": batch, "decode_batch": decode_batch}
    result["ceiling_tflops"] = product_ceiling()

    torch.backends.cudnn.allow_tf32 = False  # the reference is fp32 throughout
    few = random_images(config, 8, seed=1)
    codebooks = {stream: model.codebook(stream).clone() for stream in config.streams}
    exact = plain_encode(model, few, codebooks)
    exact_pooled = model.encode(few).pooled
    exact_codes = {stream: codes.view(len(few), *config.grid, -1) for stream, codes in exact.items()}
    exact_images = model.decode(exact_codes)
    torch.backends.cudnn.allow_tf32 = True
    fast = FastDualToken(model)
    model.to(torch.bfloat16)

    encoded = fast.encode(few)
    codes = {stream: codes.flatten(0, 2) for stream, codes in encoded.codes.items()}
    relative = lambda a, b: ((a.float() - b).norm() / b.norm()).item()
    result["agreement_with_fp32"] = {
        "fast": agreement(codes, exact),
        "plain": agreement(plain_encode(model, few, codebooks), exact),
        "pooled_relative_error": relative(encoded.pooled, exact_pooled),
        "decode_relative_error": relative(fast.decode(exact_codes), exact_images),
    }

    images = random_images(config, batch, seed=2)
    result["plain_encode_ms"] = milliseconds(lambda: plain_encode(model, images, codebooks), repeats=5)
    result["plain_encode_gib"] = peak_gib(lambda: plain_encode(model, images, codebooks))
    xs = vectors(model, images)

    def search(one) -> dict[str, Tensor]:
        return {name: one(x, codebooks[name], config.streams[name].depth) for name, x in xs.items()}

    result["plain_search_ms"] = milliseconds(lambda: search(plain_residual_codes), repeats=5)
    result["fast_search_ms"] = milliseconds(lambda: search(residual_codes))
    fused, plain = search(residual_codes), search(plain_residual_codes)
    result["search_agreement_with_plain"] = agreement(fused, plain)
    result["search_worst_excess"] = {
        name: max(worst_excess(x[:8192], codebooks[stream], codes[stream][:8192]) for stream, x in xs.items())
        for name, codes in (("fast", fused), ("plain", plain))
    }
    drawn = {name: plain[name].view(batch, *config.grid, -1)[:decode_batch] for name in config.feeding("picture")}
    xs = fused = plain = None  # their memory is free again
    result["plain_decode_ms"] = milliseconds(lambda: model._decode(_embedding(drawn, codebooks)), repeats=5)
    model.cpu()  # so that the fast version's memory is its own

    result["fast_encode_ms"] = milliseconds(lambda: fast.encode(images, pooled=False))
    result["fast_encode_gib"] = peak_gib(lambda: fast.encode(images, pooled=False))
    result["fast_encode_pooled_ms"] = milliseconds(lambda: fast.encode(images))
    result["fast_decode_ms"] = milliseconds(lambda: fast.decode(drawn))
    for name in ("plain_encode", "fast_encode", "fast_encode_pooled"):
        result[f"{name}_images_per_s"] = 1000 * batch / result[f"{name}_ms"]
    for name in ("plain_decode", "fast_decode"):
        result[f"{name}_images_per_s"] = 1000 * decode_batch / result[f"{name}_ms"]
    result["encode_gflop_per_image"] = encode_flops(config) / 1e9
    result["encode_tflops"] = result["fast_encode_images_per_s"] * result["encode_gflop_per_image"] / 1000
    result["encode_share_of_ceiling"] = result["encode_tflops"] / result["ceiling_tflops"]
    return result


def _embedding(codes: dict[str, Tensor], codebooks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: codebooks[name][c].sum(dim=-2).flatten(1, 2).to(torch.bfloat16) for name, c in codes.items()}


def table(r: dict) -> str:
    def row(name, unit, plain, fast, factor):
        return f"{name:<28}{plain:>12,.1f}{fast:>12,.1f}{factor:>10.2f} x   {unit}"

    lines = [f"{r['config']} on {r['gpu']}, torch {r['torch']}, batch {r['batch']}, decode batch {r['decode_batch']}"]
    lines += [f"{'':<28}{'plain':>12}{'fast':>12}"]
    for name in ("encode", "decode"):
        plain, fast = r[f"plain_{name}_images_per_s"], r[f"fast_{name}_images_per_s"]
        lines.append(row(f"{name}{' to codes' if name == 'encode' else ''}", "images/s", plain, fast, fast / plain))
    plain, fast = r["plain_search_ms"], r["fast_search_ms"]
    lines.append(row("code search, all streams", "ms a batch", plain, fast, plain / fast))
    plain, fast = r["plain_encode_gib"], r["fast_encode_gib"]
    lines.append(row("peak memory of encode", "GiB", plain, fast, plain / fast))
    lines.append(f"encode with pooled {r['fast_encode_pooled_images_per_s']:,.1f} images/s")
    lines.append(
        f"encode {r['encode_gflop_per_image']:,.0f} GFLOP an image, {r['encode_tflops']:.0f} TFLOP/s = "
        f"{r['encode_share_of_ceiling']:.0%} of the measured product ceiling, {r['ceiling_tflops']:.0f}"
    )
    for key in ("agreement_with_fp32", "search_agreement_with_plain", "search_worst_excess"):
        lines.append(f"{key}: {json.dumps(r[key])}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="384_rvq8")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--decode-batch", type=int, default=32)
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs CUDA, and PyTorch sees no GPU here")
    config = preset(CONFIGS[arguments.config])
    result = {"config": arguments.config, **measure(config, arguments.batch, arguments.decode_batch)}
    print(table(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
