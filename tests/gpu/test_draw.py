"""Drawing with captured graphs draws what the uncaptured steps draw, and fits one forward pass on the GPU as well."""

import pytest
import torch
from transformers import SiglipConfig

from megadual.hf import rollout
from megadual.hf.configuration_megadual import MegaDualConfig
from megadual.hf.generation import Guidance
from megadual.hf.modeling_megadual import MegaDualForCausalLM
from megadual.streams import SPECIAL_TOKENS, SpecialIds
from megadual.vision.config import DualTokenConfig, StreamConfig

N, DEPTH, CODEBOOK = 16, 3, 32
CAPTIONS = [[10, 11, 12], [20, 21, 22, 23, 24, 25]]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    siglip = SiglipConfig(
        vision_config=dict(**tower, image_size=16, patch_size=4),
        text_config=dict(**tower, vocab_size=64, bos_token_id=0, eos_token_id=0),
    )
    dualtoken = DualTokenConfig(
        siglip.to_dict(),
        {
            "semantic": StreamConfig(layers=[3], feeds=["teacher"], codebook_size=CODEBOOK, code_dim=8, depth=DEPTH),
            "pixel": StreamConfig(layers=[2, 1], feeds=["picture"], codebook_size=CODEBOOK, code_dim=8, depth=DEPTH),
        },
        decoder_latent=4, decoder_in_channels=16, decoder_channels=8, decoder_multipliers=[1, 1, 2],
        decoder_res_blocks=1, decoder_attention=[], decoder_norm_groups=4,
    )  # fmt: skip
    text = dict(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    head = dict(width=32, layers=2, heads=2, ffn=48)
    torch.manual_seed(0)
    config = MegaDualConfig(
        text, 1e4, head=head, dualtoken=dualtoken.to_dict(), special_ids=vars(SpecialIds(*range(len(SPECIAL_TOKENS))))
    )
    model = MegaDualForCausalLM(config).to(request.param).cuda().eval()
    model.dualtoken.float()
    model.model.rotary_emb.float()
    return model


def drawn(model, **options) -> list[int]:
    return model.draw_codes(CAPTIONS, seed=5, **options)["pixel"].flatten().tolist()


def test_a_captured_graph_draws_what_the_steps_draw(model, monkeypatch):
    captured = drawn(model)
    colder = drawn(model, temperature=0.3)
    assert captured == drawn(model) and captured != colder
    monkeypatch.setattr(rollout, "captured", lambda step, device: step)
    model._kept = (None, None)
    assert captured == drawn(model) and colder == drawn(model, temperature=0.3)


def test_three_branches_draw_what_the_steps_draw_and_what_two_draw(model, monkeypatch):
    """With equal scales the branch between weighs nothing."""
    special, prompt = model.config.special, torch.arange(10, 30).expand(2, -1).cuda()
    embeds = model.model.embed_tokens(
        torch.cat([prompt, torch.full_like(prompt[:, :1], special.image_gen_start)], dim=1)
    )
    whole = torch.ones(embeds.shape[:2], dtype=torch.bool, device="cuda")
    image, none = whole.clone(), whole.clone()
    image[:, 12:18], none[:, 4:18] = False, False

    def edited(kept, *scales) -> list[int]:
        with torch.no_grad():
            codes = model._codes(embeds, kept, Guidance(*scales), 1.0, 900, 0.96, 5, None, False)
        return torch.cat([each.flatten() for each in codes.values()]).tolist()

    branches = [whole, image, none]
    captured = edited(branches, 3.0, 1.5)
    assert model._kept[1].branches == 3 and captured != edited(branches, 3.0, 2.5)
    two = edited([whole, none], 3.0)
    three = edited(branches, 3.0, 3.0)
    if model.dtype == torch.float32:  # bf16 rounds a row differently among more rows
        assert sum(a != b for a, b in zip(two, three, strict=True)) < 0.02 * len(two)
    monkeypatch.setattr(rollout, "captured", lambda step, device: step)
    model._kept = (None, None)
    assert captured == edited(branches, 3.0, 1.5)


def test_other_weights_are_not_drawn_with_an_old_graph(model):
    before = drawn(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(-30)
        model.projector[2].weight.mul_(30)
    assert drawn(model) != before


def test_forced_steps_equal_one_forward_pass(model):
    special = model.config.special
    generator = torch.Generator().manual_seed(0)
    forced = {s: torch.randint(CODEBOOK, (1, N, DEPTH), generator=generator).cuda() for s in model.streams}
    seen = {stream: torch.zeros(N, DEPTH, CODEBOOK, device="cuda") for stream in model.streams}

    def choose(position, stream, d, logits):
        seen[stream][position, d] = logits[0]
        return forced[stream][:, position, d]

    model.draw_codes(CAPTIONS[:1], cfg_scale=1.0, choose=choose)
    ids = torch.tensor([[*CAPTIONS[0], special.image_gen_start] + [special.image] * N], device="cuda")
    with torch.no_grad():
        whole = model(input_ids=ids, codes=forced)
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    for stream, logits in whole.visual_logits.items():
        assert (seen[stream] - logits.float()).abs().max() < tolerance
