"""Model FLOPs against a count of what torch really multiplies."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from megadual.model.config import HeadConfig, ModelConfig
from megadual.model.depth_head import DepthHead
from megadual.model.dual_lm import Vocabulary
from megadual.model.flops import step_flops, work
from megadual.streams import Stream
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed

MODEL = ModelConfig(
    layers=3, hidden=64, ffn=160, heads=4, kv_heads=2, tie_embeddings=False, dualtoken="", text_tokenizer="",
    head=HeadConfig(width=32, layers=2, heads=2, ffn=48),
)  # fmt: skip
STREAMS = [Stream("a", 4, 64, 8), Stream("b", 2, 96, 16)]
VOCABULARY = Vocabulary(256, STREAMS, {s.name: torch.randn(s.codebook_size, s.code_dim) for s in STREAMS})


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_transformer_and_text_head():
    length = 16
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    ))  # fmt: skip
    forward = counted(lambda: model(torch.arange(length)[None]))
    ours = step_flops(MODEL, VOCABULARY, length, length**2, 0, length, 0) / 3
    # eager attention multiplies the masked half too
    assert ours + 2 * 3 * work(MODEL, VOCABULARY).attention * length**2 == forward


def test_visual_heads():
    drawn, forward = 5, 0
    for stream in STREAMS:
        head = DepthHead(64, 32, 2, 2, 48, stream.depth, stream.codebook_size, stream.code_dim)
        hidden, codes = torch.randn(drawn, 64), torch.randint(stream.codebook_size, (drawn, stream.depth))
        forward += counted(lambda: head(hidden, codes, VOCABULARY.codebooks[stream.name]))  # noqa: B023
    ours = step_flops(MODEL, VOCABULARY, 0, 0, 0, 0, drawn) / 3
    assert abs(ours - forward) < 0.1 * forward  # the first depth has no code to project, attention is halved


def counted_steps(runs) -> list[tuple[float, float]]:
    """FLOPs of a step of each run: what torch multiplies, and what the step says."""
    steps = []
    for run in runs:
        engine, data = tiny.build(run)
        batches, results = data.step(0), []
        torch_says = counted(lambda: results.append(engine.train_step(batches)))  # noqa: B023
        steps.append((torch_says, results[0].flops))
        engine.shutdown()
    return steps


def test_frozen_parts(tmp_path):
    """Relative to a step that trains everything; torch counts padding and the masked half of attention too."""
    shards = tiny.write_tiny_set(tmp_path / "set", count=20)
    parts = ["projector,llm,heads", "projector", "heads", "projector,llm", "llm"]
    runs = [tiny.tiny_run(tmp_path, shards, f"train.parts=[{part}]") for part in parts]
    (steps,) = run_distributed(counted_steps, 1, runs)
    every, *frozen = steps
    for step in frozen:
        assert step[1] / every[1] == pytest.approx(step[0] / every[0], rel=0.05) and step[1] < every[1]
