"""The table of names and layouts, read in both directions."""

import pytest
import torch

from megadual.hf.mapping import CODEBOOK_PLACES, Sizes, codebook_of, origins, to_hf

CODEBOOKS = {f"{place}.{stream}" for place in CODEBOOK_PLACES for stream in ("semantic", "pixel")}
SIZES = Sizes(heads=6, kv_heads=2, text_size=300, padded_text_size=384)
H, HEAD, FFN = 24, 4, 40


def trainer_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embedding.word_embeddings.weight": (384, H),
        "embedding.projector.0.weight": (H, 16),
        "embedding.projector.2.bias": (H,),
        "decoder.final_layernorm.weight": (H,),
        "output_layer.weight": (384, H),
        "heads.semantic.classifiers": (3, 32, 8),
        "heads.pixel.layers.1.qkv.weight": (24, 8),
    }
    for i in (0, 11):
        shapes |= {
            f"decoder.layers.{i}.input_layernorm.weight": (H,),
            f"decoder.layers.{i}.self_attention.linear_qkv.weight": (10 * HEAD, H),
            f"decoder.layers.{i}.self_attention.linear_qkv.bias": (10 * HEAD,),
            f"decoder.layers.{i}.self_attention.linear_proj.weight": (H, H),
            f"decoder.layers.{i}.pre_mlp_layernorm.weight": (H,),
            f"decoder.layers.{i}.mlp.linear_fc1.weight": (2 * FFN, H),
            f"decoder.layers.{i}.mlp.linear_fc2.weight": (H, FFN),
        }
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[name][300:] = 0
    return state


def exported(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {hf: part for name, tensor in state.items() for hf, part in to_hf(name, tensor, SIZES).items()}


def test_round_trip_is_bitwise():
    state = trainer_state()
    hf = exported(state) | {codebook_of(name): torch.randn(33, 8) for name in CODEBOOKS}
    hf |= {"dualtoken.decoder.conv_in.weight": torch.ones(1)}
    back = {name: origin.merge(hf.__getitem__, SIZES) for name, origin in origins(hf).items()}
    assert set(back) == set(state) | CODEBOOKS
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert all(torch.equal(back[name], hf[codebook_of(name)][:-1]) for name in CODEBOOKS)
    assert all(to_hf(name, back[name], SIZES) == {} for name in CODEBOOKS)


def test_shapes_are_known_without_data():
    state = trainer_state()
    hf = exported(state)
    shapes = exported({name: tensor.to("meta") for name, tensor in state.items()})
    assert {name: tensor.shape for name, tensor in shapes.items()} == {name: t.shape for name, t in hf.items()}
    for name, origin in origins(shapes).items():
        if name not in CODEBOOKS:
            assert origin.merge(shapes.__getitem__, SIZES).shape == state[name].shape


def test_qkv_rows_go_where_they_belong():
    """Row by row, against the layout's definition: for each KV group its 3 query heads, its key, its value."""
    name = "decoder.layers.11.self_attention.linear_qkv.weight"
    packed = trainer_state()[name]
    hf = to_hf(name, packed, SIZES)
    q, k, v = (hf[f"model.layers.11.self_attn.{x}_proj.weight"] for x in "qkv")
    assert q.shape == (6 * HEAD, H) and k.shape == v.shape == (2 * HEAD, H)
    for group in range(2):
        start = group * 5 * HEAD
        for i in range(3):
            head = group * 3 + i
            assert torch.equal(q[head * HEAD :][:HEAD], packed[start + i * HEAD :][:HEAD])
        assert torch.equal(k[group * HEAD :][:HEAD], packed[start + 3 * HEAD :][:HEAD])
        assert torch.equal(v[group * HEAD :][:HEAD], packed[start + 4 * HEAD :][:HEAD])


def test_gate_comes_before_up_and_padding_goes():
    state = trainer_state()
    hf = exported(state)
    packed = state["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(hf["model.layers.0.mlp.gate_proj.weight"], packed[:FFN])
    assert torch.equal(hf["model.layers.0.mlp.up_proj.weight"], packed[FFN:])
    assert len(hf["lm_head.weight"]) == len(hf["model.embed_tokens.weight"]) == 300


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="decoder.layers.0.experts.weight.*no entry"):
        to_hf("decoder.layers.0.experts.weight", torch.ones(1), SIZES)
    with pytest.raises(ValueError, match="model.layers.0.router.weight.*no entry"):
        origins(["model.layers.0.router.weight"])
    merged = origins(["model.layers.0.mlp.gate_proj.weight"])["decoder.layers.0.mlp.linear_fc1.weight"]
    with pytest.raises(KeyError, match="up_proj"):
        merged.merge({"model.layers.0.mlp.gate_proj.weight": torch.ones(2, 2)}.__getitem__, SIZES)
