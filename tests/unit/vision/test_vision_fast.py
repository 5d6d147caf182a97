"""FastDualToken against the DualToken that it comes from, and the parts that are computed another way."""

import pytest
import torch
from torch import nn

from megadual.testing.vision import tiny_dualtoken
from megadual.vision.decoder import Upsample
from megadual.vision.fast import ChannelGroupNorm, FastDualToken, TransposedUpsample


def perturbed(model):
    """Weights under which no bias, norm or head drops out of the result."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"semantic": {"code_dim": 32}, "pixel": {"layers": [2, 1]}},
        {"pixel": {"feeds": ["teacher", "picture"], "layers": [2], "weights": []}},
    ],
    ids=["narrow", "wide and narrow, two layers", "one stream for both goals beside another"],
)
def test_encode_in_fp32_gives_the_same_codes_and_pooled(changes):
    model = perturbed(tiny_dualtoken(streams=changes))
    expected, result = model.encode(images()), FastDualToken(model, torch.float32).encode(images())
    for stream, codes in expected.codes.items():
        assert torch.equal(result.codes[stream], codes), stream
    torch.testing.assert_close(result.pooled, expected.pooled, rtol=1e-4, atol=1e-5)


def test_without_pooled_the_codes_are_the_same():
    model = perturbed(tiny_dualtoken())
    for tokenizer in (model, FastDualToken(model, torch.float32)):
        codes = tokenizer.encode(images(), pooled=False)
        assert codes.pooled is None
        assert torch.equal(codes.codes["semantic"], model.encode(images()).codes["semantic"])


@pytest.mark.parametrize("latent, multipliers", [(4, [1, 2, 2]), (8, [1, 2])], ids=["same grid", "resized grid"])
def test_decode_in_fp32_gives_the_same_images(latent, multipliers):
    model = perturbed(
        tiny_dualtoken(decoder_latent=latent, decoder_multipliers=multipliers, decoder_attention=[latent])
    )
    codes = {"pixel": torch.randint(0, 32, (2, 4, 4, 3), generator=torch.Generator().manual_seed(3))}
    decoded = FastDualToken(model, torch.float32).decode(codes)
    torch.testing.assert_close(decoded, model.decode(codes), rtol=1e-4, atol=1e-4)


def test_bf16_encodes_and_decodes():
    fast = FastDualToken(perturbed(tiny_dualtoken()))
    codes = fast.encode(images())
    assert codes.pooled.dtype == torch.bfloat16
    assert fast.decode(codes.codes).shape == (3, 3, 16, 16)


def test_wrong_shapes_are_named():
    fast = FastDualToken(tiny_dualtoken())
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\).*takes \(B, 3, 16, 16\)"):
        fast.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="pixel codes of shape"):
        fast.decode({"pixel": torch.zeros(1, 4, 4, 2, dtype=torch.int64)})


def test_channel_group_norm_is_group_norm():
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 16, 5, 7) * 3 + 1
    torch.testing.assert_close(ChannelGroupNorm(norm)(x), norm(x), rtol=1e-4, atol=1e-5)


def test_transposed_upsample_is_upsample_and_convolution():
    torch.manual_seed(0)
    upsample = Upsample(6)
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(TransposedUpsample(upsample)(x), upsample(x), rtol=1e-4, atol=1e-5)
