"""Seconds an image, images/s and tokens/s of an exported model on one GPU, beside the plain way, in one run.

python benchmarks/draw.py [--preset 7b] [--batches 1 32] [--output result.json]

Random weights in bf16, made on the GPU: a Qwen2.5-shaped LLM, images of 256 positions, 4 + 4 codes, guidance 3 (the
batch doubled). "plain" is transformers' Qwen2 with its dynamic cache and the depth heads run anew over all codes so
far at every depth, eager; its time for an image is extrapolated from --plain-positions positions. The floor is the
time to read, at --bandwidth, the weights that a position uses: the LLM's layers once, the heads' at every depth.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from megadual.hf.configuration_megadual import MegaDualConfig
from megadual.hf.decoding import Sampler, captured
from megadual.hf.generation import Guidance
from megadual.hf.modeling_megadual import MegaDualForCausalLM
from megadual.hf.rollout import Rollout
from megadual.kernels import few_rows
from megadual.model.config import PRESETS
from megadual.streams import SPECIAL_TOKENS, SpecialIds
from megadual.vision.presets import preset

VOCABULARY = 151_672
SPECIAL = SpecialIds(*range(VOCABULARY - len(SPECIAL_TOKENS), VOCABULARY))
DUALTOKEN = "siglip2-so400m-256-rvq4"
CAPTION = list(range(1000, 1024))
SCALE = 3.0
BLOCKINGS = [
    (16, 256, 4, 4), (16, 128, 4, 6), (16, 512, 4, 3), (16, 256, 2, 4), (16, 512, 8, 4), (16, 256, 4, 6),
    (32, 256, 4, 4), (32, 128, 4, 5),
]  # fmt: skip


def random_model(name: str, device: str = "cuda") -> MegaDualForCausalLM:
    """An exported model of a preset's shape, in bf16 but for its DualToken."""
    sizes = PRESETS[name]
    text_config = dict(
        vocab_size=VOCABULARY,
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["ffn"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        tie_word_embeddings=sizes["tie_embeddings"],
    )
    config = MegaDualConfig(
        text_config,
        sizes["rope_base"],
        head=sizes["head"],
        dualtoken=preset(DUALTOKEN).to_dict(),
        special_ids=vars(SPECIAL),
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = MegaDualForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.dualtoken.float()
    return model.requires_grad_(False).eval()


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Median wall time of a call that ends on the GPU."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def position_bytes(model) -> int:
    """Bytes of the weights that one image position uses."""
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    heads = 0
    for head in model.heads.values():
        depths = len(head.depth_embedding)
        heads += size(head.projector) + depths * size(head.layers) + head.classifiers.numel() * 2
    return size(model.model.layers) + size(model.projector) + heads


def plain_state(head, hidden, codes_RD, codebook_KC) -> torch.Tensor:
    """(R, W) normed state of the depth after `codes`, in PyTorch's eager operations."""
    before = head.code_projector(F.embedding(codes_RD, codebook_KC).cumsum(1).to(hidden.dtype))
    x = torch.cat([head.projector(hidden)[:, None], before], dim=1)
    x = x + head.depth_embedding[: x.size(1)]
    for layer in head.layers:
        q, k, v = layer.qkv(layer.attention_norm(x)).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + layer.out(attended.transpose(1, 2).flatten(2))
        gate, up = layer.gate_up(layer.ffn_norm(x)).chunk(2, dim=-1)
        x = x + layer.down(F.silu(gate) * up)
    return head.norm(x)[:, -1]


@torch.no_grad()
def plain_draw(model, captions: list[list[int]], positions: int) -> None:
    """The first `positions` positions of an image for each caption, the way one writes it without caches in mind."""
    sampler = Sampler(900, model.device)
    prompts = [[*caption, SPECIAL.image_gen_start] for caption in captions]
    ids = torch.tensor(prompts + [[0] * len(CAPTION) + [SPECIAL.image_gen_start]] * len(prompts), device=model.device)
    mask = torch.ones_like(ids)
    mask[len(prompts) :, : len(CAPTION)] = 0
    places, embeds, cache = (mask.cumsum(-1) - 1).clamp(min=0), model.model.embed_tokens(ids), None
    for _ in range(positions):
        outputs = model.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
        )
        cache, hidden = outputs.past_key_values, outputs.last_hidden_state[:, -1]
        chosen_codes = {}
        for stream, head in model.heads.items():
            codebook = model.dualtoken.codebook(stream)
            codes = torch.empty(len(prompts), 0, dtype=torch.int64, device=model.device)
            for d in range(len(head.depth_embedding)):
                state = plain_state(head, hidden, codes.repeat(2, 1), codebook)
                captioned, bare = F.linear(state, head.classifiers[d]).float().chunk(2)
                uniform = torch.rand(len(prompts), device=model.device)
                chosen = sampler(bare + SCALE * (captioned - bare), uniform)
                codes = torch.cat([codes, chosen[:, None]], dim=1)
            chosen_codes[stream] = codes.repeat(2, 1)
        embeds = model.embed_codes(chosen_codes)[:, None]
        mask, places = F.pad(mask, (0, 1), value=1), places[:, -1:] + 1


def drawing(model, batch: int, plain_positions: int, floor: float) -> dict[str, float]:
    """Both ways at one batch size."""
    captions = [CAPTION] * batch
    positions = model.dualtoken.config.grid[0] ** 2
    draw = lambda seed=0: model.draw_codes(captions, SCALE, seed=seed)
    grid = model.dualtoken.config.grid
    decode = lambda codes: model.dualtoken.decode({name: each.unflatten(1, grid) for name, each in codes.items()})
    capture = seconds(draw)
    codes = seconds(draw, repeats=3)
    with torch.no_grad():
        drawn = draw()
        decode(drawn)
        pixels = seconds(lambda: decode(drawn), repeats=3)
    again = draw()
    assert all(torch.equal(drawn[stream], again[stream]) for stream in drawn), "the same seed drew other codes"
    rollout = model._kept[1]
    step = captured(lambda: rollout.llm.step(rollout.embeds_RH), model.device)
    rollout.llm.reset()
    llm = seconds(lambda: [step() for _ in range(64)]) / 64
    edits = editing(model, batch, positions)
    plain_draw(model, captions, plain_positions)  # kernels for every length are chosen here
    plain = seconds(lambda: plain_draw(model, captions, plain_positions)) / plain_positions * positions
    return {
        "batch": batch,
        "plain: s a batch, extrapolated": plain,
        "ours: s a batch, codes and pixels": codes + pixels,
        "ours: images/s": batch / (codes + pixels),
        "times faster": plain / (codes + pixels),
        "ms a position": codes / positions * 1e3,
        "of it the LLM's step, ms": llm * 1e3,
        "pixels, ms": pixels * 1e3,
        "an edit's position of three branches, ms": edits / positions * 1e3,
        "first call, s": capture,
        "share of the floor": floor * positions / (codes + pixels),
    }


@torch.no_grad()
def editing(model, batch: int, positions: int) -> float:
    """Seconds for the codes of a batch of edits: source image and instruction, each with a scale of its own."""
    embeds = model.model.embed_tokens(torch.arange(positions + len(CAPTION), device=model.device).expand(batch, -1))
    whole = torch.ones(embeds.shape[:2], dtype=torch.bool, device=model.device)
    image, none = whole.clone(), whole.clone()
    image[:, positions:-1], none[:, :-1] = False, False
    guidance, sampling = Guidance(SCALE, 1.5), (1.0, 900, 0.96)
    edit = lambda: model._codes(embeds, [whole, image, none], guidance, *sampling, 0, None, False)
    edit()
    return seconds(edit, repeats=3)


@torch.no_grad()
def text(model, tokens: int, plain_tokens: int) -> dict[str, float]:
    """Greedy text after a prompt of 300 positions, every token read by the host as `describe` does."""
    ids = torch.arange(300, device=model.device)[None]
    rollout = Rollout(model, 1, 1, ids.size(1) + tokens)
    write = rollout.write
    rollout.start(model.model.embed_tokens(ids), torch.ones_like(ids, dtype=torch.bool))

    def ours():
        for _ in range(tokens):
            write()
            rollout.tokens_B.tolist()

    fast = tokens / seconds(ours)
    plain = lambda n: model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False
    )
    plain(4 + plain_tokens)  # kernels for every length are chosen here
    before = seconds(lambda: plain(4))
    slow = plain_tokens / (seconds(lambda: plain(4 + plain_tokens)) - before)
    return {"plain: tokens/s": slow, "ours: tokens/s": fast}


def products(model, rows: int) -> list[dict]:
    """GB/s at which the products of a position read their weights: PyTorch's, and the kernel's at several blockings."""
    layer, head = model.model.layers[0], next(iter(model.heads.values()))
    weights = {
        "attention out": layer.self_attn.o_proj.weight,
        "gate": layer.mlp.gate_proj.weight,
        "down": layer.mlp.down_proj.weight,
        "head qkv": head.layers[0].qkv.weight,
        "head down": head.layers[0].down.weight,
        "classifier": head.classifiers[0],
        "text": model.lm_head.weight,
    }
    chosen, results = few_rows.BLOCKS, []
    for name, weight in weights.items():
        copies = [weight] + [weight.clone() for _ in range(min(8, 400_000_000 // weight.numel()))]  # beyond the L2
        x = torch.randn(rows, weight.size(1), device=weight.device, dtype=weight.dtype)
        rates = {}
        for blocks in (None, *BLOCKINGS):
            few_rows.BLOCKS, product = blocks or chosen, few_rows.linear if blocks else F.linear
            run = captured(lambda: [product(x, copy) for copy in copies], weight.device)  # noqa: B023
            rates[str(blocks)] = round(len(copies) * weight.numel() * 2 / seconds(run, repeats=7) / 1e9)
        results.append({"product": name, "N": weight.size(0), "K": weight.size(1), **rates})
        print(json.dumps(results[-1]), flush=True)
    few_rows.BLOCKS = chosen
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b", choices=sorted(PRESETS), help="shape of the LLM and of the heads")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32], help="images drawn together")
    parser.add_argument("--plain-positions", type=int, default=16, help="positions that the plain way is timed on")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes/s of the floor; an H100 SXM's default")
    parser.add_argument("--products", type=int, default=0, metavar="ROWS", help="time the matrix products alone, too")
    parser.add_argument("--output", type=Path, help="JSON file to write the results to")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a GPU")

    start = time.perf_counter()
    model = random_model(args.preset)
    floor = position_bytes(model) / args.bandwidth
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "preset": args.preset,
        "GB a position": position_bytes(model) / 1e9,
        "model made, s": time.perf_counter() - start,
    }
    print(json.dumps(report), flush=True)
    if args.products:
        report["products, GB/s"] = products(model, args.products)
    report["text"] = text(model, tokens=128, plain_tokens=32)
    print(json.dumps(report["text"]), flush=True)
    report["drawing"] = []
    for batch in args.batches:
        report["drawing"].append(drawing(model, batch, args.plain_positions, floor))
        print(json.dumps(report["drawing"][-1]), flush=True)
    report["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"peak memory, GiB": report["peak memory, GiB"]}), flush=True)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
