"""Peak memory of the output layer and the visual heads, forward and backward, beside full logits.

python benchmarks/head_memory.py [--positions 4096] [--hidden 3584]

The released sizes: 152,064 text tokens; two heads of width 2048, 3 layers, 8 depths of 16,384 codes. Half of the
positions predict text and half are drawn; "plain" makes the logits of all its targets at once, in fp32 for the
cross-entropy. Each is run in a process of its own; what is reported is the peak above weights and inputs: of the
GPU's allocations in bf16, or of resident memory in fp32 where there is no GPU.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F

from megadual.model.depth_head import DepthHead
from megadual.model.fused import linear_cross_entropy

TEXT, CODES, DEPTH, CODE_WIDTH = 152_064, 16_384, 8, 32
PARTS = ("output layer", "visual heads")
GIB = 2**30


def plain_text(hidden_PH, weight_VH, target_P):
    return F.cross_entropy(F.linear(hidden_PH, weight_VH).float(), target_P, reduction="sum")


def fused_text(hidden_PH, weight_VH, target_P):
    return linear_cross_entropy(hidden_PH[None], weight_VH[None], target_P[None]).sum()


def plain_head(head: DepthHead, hidden_PH, codes_PD, codebook_KC):
    logits_PDK = head.logits(hidden_PH, codes_PD[:, :-1], codebook_KC).float()
    return F.cross_entropy(logits_PDK.flatten(0, 1), codes_PD.flatten(), reduction="sum")


def fused_head(head: DepthHead, hidden_PH, codes_PD, codebook_KC):
    return head(hidden_PH, codes_PD, codebook_KC).sum()


def measure(part: str, plain: bool, positions: int, hidden: int) -> float:
    """GiB above what was there before, at the peak of a forward and a backward pass."""
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    factory = dict(device="cuda", dtype=torch.bfloat16) if cuda else {}
    hidden_PH = torch.randn(positions // 2, hidden, **factory, requires_grad=True)
    if part == "output layer":
        weight = torch.nn.Parameter(torch.randn(TEXT, hidden, **factory))
        target = torch.randint(TEXT, (positions // 2,), device=hidden_PH.device)
        run = lambda: (plain_text if plain else fused_text)(hidden_PH, weight, target).backward()
    else:
        heads = [DepthHead(hidden, 2048, 3, 16, 5504, DEPTH, CODES, CODE_WIDTH).to(**factory) for _ in range(2)]
        codes = torch.randint(CODES, (positions // 2, DEPTH), device=hidden_PH.device)
        codebook = torch.randn(CODES, CODE_WIDTH, device=hidden_PH.device)
        loss_of = plain_head if plain else fused_head
        run = lambda: sum(loss_of(head, hidden_PH, codes, codebook) for head in heads).backward()
    if not cuda:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / GIB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--here", nargs=2, metavar=("PART", "WAY"), help="measure one in this process")
    args = parser.parse_args()
    if args.here:
        part, way = args.here
        print(json.dumps(measure(part, way == "plain", args.positions, args.hidden)))
        return
    print("| peak GiB | plain | ours |\n| --- | --- | --- |")
    for part in args.parts:
        sizes = [f"--positions={args.positions}", f"--hidden={args.hidden}"]
        gib = [
            json.loads(subprocess.check_output([sys.executable, __file__, *sizes, "--here", part, way]))
            for way in ("plain", "ours")
        ]
        print(f"| {part} | {gib[0]:.2f} | {gib[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
