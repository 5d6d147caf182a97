"""A DualToken arranged for throughput on a GPU: the same function as `DualToken.encode` and `.decode`, in bf16.

What makes the difference, from the largest on:
- one product for q, k and v; one for the qkv and the skip of a prequant projection; norms' weights folded into the
  products behind them; GELU inside the product's epilogue;
- products add into the residual stream in place. Their biases wait in a `shift`, which the next norm adds while it
  reads the stream, so no kernel exists only to add;
- Triton kernels for the residual quantisers and the norms (`megadual.kernels`), cuDNN's attention;
- the decoder works channels-last, compiled, and its upsampling convolutions read the small map (`TransposedUpsample`).

Shape suffixes: B batch, N positions, R = B * N, E SigLIP width, H heads, W head width, C code width, D code depth.
"""

import copy

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megadual import kernels

from .decoder import AttnBlock, Upsample
from .projection import AttnProjection
from .quantizer import residual_codes, sum_of_codes
from .tokenizer import DualToken, Encoded, centre_crop, check_images, check_picture_codes, to_tensor

# cuDNN's attention is the fastest of PyTorch's on Hopper, but does not take all widths.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def normalise(x_RE: Tensor, shift_E: Tensor, eps: float) -> Tensor:
    """LayerNorm without weight and bias of x + shift, computed in fp32, in the dtype of x."""
    if kernels.normalise is not None and x_RE.is_cuda:
        return kernels.normalise.normalise(x_RE, shift_E, eps)
    return F.layer_norm(x_RE + shift_E, x_RE.shape[-1:], eps=eps).to(x_RE.dtype)


def attend(qkv_RE: Tensor, batch: int, heads: int) -> Tensor:
    """Self-attention over packed q, k, v (R, 3 * H * W) -> (R, H * W)."""
    q_BHNW, k_BHNW, v_BHNW = qkv_RE.unflatten(0, (batch, -1)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q_BHNW, k_BHNW, v_BHNW).transpose(1, 2).reshape(len(qkv_RE), -1)


def compiled(function, device: torch.device):
    """Elementwise chains are worth compiling where launches and memory traffic count."""
    return torch.compile(function) if device.type == "cuda" else function


def captured(function, example: Tensor):
    """`function` of one CUDA tensor as a CUDA graph for that tensor's shape: a call is a copy and a single launch.

    The tensor that a call returns is overwritten by the next one. Inputs may lie in pinned memory.
    """
    fixed, stream = example.clone(), torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles and loads what may not happen while capturing
        for _ in range(3):
            function(fixed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(fixed)

    def replay(x: Tensor) -> Tensor:
        fixed.copy_(x, non_blocking=True)
        graph.replay()
        return result

    return replay


def pad_columns(x: Tensor) -> Tensor:
    """Zeros up to a multiple of 8 columns, which fast products ask for (a patch of 14 x 14 has 588 numbers)."""
    return F.pad(x, (0, -x.shape[-1] % 8))


def behind_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear map that takes what `normalise` gives in place of what `norm` gives."""
    weight = weight.float()
    return (weight * norm.weight).to(dtype), (bias + weight @ norm.bias.float()).to(dtype)


class FastLayer:
    """A SigLIP layer that adds its two outputs, without their biases, into the residual stream in place.

    The true stream is x + `shift`; `shift_after` is the shift behind this layer.
    """

    def __init__(self, layer: nn.Module, shift_E: Tensor, dtype: torch.dtype):
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.heads, self.activation = attention.num_heads, mlp.activation_fn
        self.eps1, self.eps2 = layer.layer_norm1.eps, layer.layer_norm2.eps
        weight, bias = torch.cat([p.weight for p in qkv]), torch.cat([p.bias for p in qkv])
        self.qkv_weight, self.qkv_bias = behind_norm(layer.layer_norm1, weight, bias, dtype)
        self.out_weight = attention.out_proj.weight.to(dtype)
        self.fc1_weight, self.fc1_bias = behind_norm(layer.layer_norm2, mlp.fc1.weight, mlp.fc1.bias, dtype)
        self.fc2_weight = mlp.fc2.weight.to(dtype)
        self.shift = shift_E
        self.shift_middle = self.shift + attention.out_proj.bias.float()
        self.shift_after = self.shift_middle + mlp.fc2.bias.float()
        self.gelu_epilogue = shift_E.is_cuda and mlp.config.hidden_act == "gelu_pytorch_tanh"

    def __call__(self, x_RE: Tensor, batch: int) -> None:
        h_RE = normalise(x_RE, self.shift, self.eps1)
        a_RE = attend(F.linear(h_RE, self.qkv_weight, self.qkv_bias), batch, self.heads)
        x_RE.addmm_(a_RE, self.out_weight.T)
        h_RE = normalise(x_RE, self.shift_middle, self.eps2)
        if self.gelu_epilogue:  # on CUDA this is the tanh form
            h = torch._addmm_activation(self.fc1_bias, h_RE, self.fc1_weight.T, use_gelu=True)
        else:
            h = self.activation(F.linear(h_RE, self.fc1_weight, self.fc1_bias))
        x_RE.addmm_(h, self.fc2_weight.T)


class FastPrequant:
    """An AttnProjection in front of a quantiser; everything of code width is fp32."""

    def __init__(self, projection: AttnProjection, dtype: torch.dtype):
        attn, norm1, norm3 = projection.attn, projection.norm1, projection.norm3
        assert norm1.eps == norm3.eps and not attn.causal  # one normalise serves both
        self.heads, self.narrows, self.eps = attn.num_heads, attn.narrows, norm1.eps
        self.split = [attn.qkv.out_features, projection.proj.out_features]
        qkv = behind_norm(norm1, attn.qkv.weight, torch.cat((attn.q_bias, attn.zero_k_bias, attn.v_bias)), dtype)
        skip = behind_norm(norm3, projection.proj.weight, projection.proj.bias, dtype)
        self.weight, self.bias = (torch.cat(pair) for pair in zip(qkv, skip, strict=True))
        self.proj, self.norm2, self.mlp = (
            copy.deepcopy(module).float() for module in (attn.proj, projection.norm2, projection.mlp)
        )

        self.finish = compiled(self._finish, self.weight.device)

    def __call__(self, x_RE: Tensor, shift_E: Tensor, batch: int) -> Tensor:
        """(R, C) fp32."""
        h_RE = normalise(x_RE, shift_E, self.eps)
        qkv_RE, skip_RC = F.linear(h_RE, self.weight, self.bias).split(self.split, dim=1)
        return self.finish(attend(qkv_RE, batch, self.heads), skip_RC)

    def _finish(self, a_RE: Tensor, skip_RC: Tensor) -> Tensor:
        a_RC = a_RE.float()
        if self.narrows:
            a_RC = a_RC.unflatten(1, (self.heads, -1)).mean(dim=1)
        y_RC = skip_RC.float() + self.proj(a_RC)
        return y_RC + self.mlp(self.norm2(y_RC))


class ChannelGroupNorm(nn.Module):
    """GroupNorm by way of sums per channel, which read a channels-last map in the order it lies in memory."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean, square = (t.mean(dim=(2, 3)).unflatten(1, (self.groups, -1)) for t in (wide, wide.square()))
        mean, square = mean.mean(dim=2, keepdim=True), square.mean(dim=2, keepdim=True)
        scale = self.weight.float().view(self.groups, -1) * (square - mean.square()).clamp(min=0).add(self.eps).rsqrt()
        shift = self.bias.float().view(self.groups, -1) - mean * scale
        return (wide * scale.flatten(1)[..., None, None] + shift.flatten(1)[..., None, None]).to(x.dtype)


class TransposedUpsample(nn.Module):
    """Nearest upsampling by 2 and the 3x3 convolution behind it, as one transposed convolution: 4/9 of the work.

    Each pixel of the small map stands for 2x2 equal ones, so the taps that meet the same pixel are summed beforehand.
    """

    def __init__(self, upsample: Upsample):
        super().__init__()
        kernel = upsample.conv.weight.detach().float().flip(2, 3)  # a transposed convolution runs its kernel backwards
        taps = sum(F.pad(kernel, (right, 1 - right, down, 1 - down)) for right in (0, 1) for down in (0, 1))
        self.weight = nn.Parameter(taps.transpose(0, 1).to(upsample.conv.weight.dtype))
        self.bias = upsample.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


class OneHeadAttention(nn.Module):
    """An AttnBlock in plain products: its one wide head is more than the attention kernels take."""

    def __init__(self, block: AttnBlock):
        super().__init__()
        self.norm, self.q, self.k, self.v, self.proj_out = block.norm, block.q, block.k, block.v, block.proj_out

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        a = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1) @ v
        return x + self.proj_out(a.transpose(1, 2).unflatten(2, x.shape[2:]))


def _replace(module: nn.Module, old: type, new: type) -> None:
    for name, child in module.named_children():
        if isinstance(child, old):
            setattr(module, name, new(child))
        else:
            _replace(child, old, new)


class FastDualToken:
    """A DualToken for inference, from its weights at this moment and on its device; after training make it anew.

    `dtype` is what the network computes in; code-wide vectors and the search are always fp32. Without CUDA the same
    computation runs uncompiled.
    """

    @torch.no_grad()
    def __init__(self, model: DualToken, dtype: torch.dtype = torch.bfloat16):
        self.config, self.dtype = model.config, dtype
        self.device = next(model.parameters()).device
        config, vision = model.config, model.siglip_model.vision_model

        patches = vision.embeddings.patch_embedding
        self.patch_weight = pad_columns(patches.weight.flatten(1)).to(dtype)
        self.position_NE = (vision.embeddings.position_embedding.weight + patches.bias).to(dtype)
        self.embed_patches = compiled(self._embed_patches, self.device)
        zero_E = torch.zeros(config.hidden_size, device=self.device)
        self.layers, shift_E = [], zero_E
        used = config.deepest if config.teacher_layer is None else len(vision.encoder.layers)
        for i, layer in enumerate(vision.encoder.layers[:used]):
            shift_E = zero_E if i == config.teacher_layer else shift_E  # there the quantised states enter afresh
            self.layers.append(FastLayer(layer, shift_E, dtype))
            shift_E = self.layers[-1].shift_after
        self.prequant = {
            name: [FastPrequant(module, dtype) for module in modules] for name, modules in model.prequant.items()
        }
        self.codebooks = {name: model.codebook(name).detach().float().clone() for name in config.streams}
        self.postquant = copy.deepcopy(model.postquant).to(dtype)
        self.post_layernorm = copy.deepcopy(vision.post_layernorm).to(dtype)
        self.head = copy.deepcopy(vision.head).to(dtype)
        if model.decoder is None:
            return
        self.decoder = nn.Sequential(copy.deepcopy(model.post_quant_conv), copy.deepcopy(model.decoder))
        self.decoder.requires_grad_(False)
        _replace(self.decoder, AttnBlock, OneHeadAttention)
        _replace(self.decoder, nn.GroupNorm, ChannelGroupNorm)
        _replace(self.decoder, Upsample, TransposedUpsample)
        self.decoder.to(dtype=dtype, memory_format=torch.channels_last)
        self.run_decoder = compiled(self.decoder, self.device)

    def _embed_patches(self, images: Tensor) -> Tensor:
        (rows, columns), side = self.config.grid, self.config.vision["patch_size"]
        x = images[:, :, : rows * side, : columns * side].to(self.dtype)
        x = x.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 1, 3, 5)
        x_BNE = F.linear(pad_columns(x.reshape(len(images), rows * columns, -1)), self.patch_weight) + self.position_NE
        return x_BNE.flatten(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor, pooled: bool = True) -> Encoded:
        """As DualToken.encode; images (B, 3, h, w) in [-1, 1] of any float dtype on this device."""
        check_images(images, self.config)
        config, batch = self.config, len(images)
        with sdpa_kernel(BACKENDS, set_priority=True):
            x_RE, read = self.embed_patches(images), {name: {} for name in config.streams}
            for i, layer in enumerate(self.layers[: config.deepest], 1):
                layer(x_RE, batch)
                for name, stream in config.streams.items():
                    for place, (number, weight) in enumerate(zip(stream.layers, stream.layer_weights, strict=True)):
                        if number == i:
                            read[name][place] = weight * self.prequant[name][place](x_RE, layer.shift_after, batch)
            codes_RD = {
                name: residual_codes(
                    sum(read[name][place] for place in sorted(read[name])), self.codebooks[name], stream.depth
                )
                for name, stream in config.streams.items()
            }
            pooled_BP = self._pool(codes_RD, batch) if pooled and config.teacher_layer is not None else None
        codes = {name: codes.view(batch, *config.grid, -1) for name, codes in codes_RD.items()}
        return Encoded(codes, pooled_BP)

    def _feed(self, goal: str, codes: dict[str, Tensor]) -> Tensor:
        """(B, N, E): what the streams give a goal, from codes (B, N, D)."""
        return sum(
            self.postquant[name][goal](self.embed(codes[name], name).to(self.dtype))
            for name in self.config.feeding(goal)
        )

    def _pool(self, codes_RD: dict[str, Tensor], batch: int) -> Tensor:
        x_RE = self._feed("teacher", {name: codes.unflatten(0, (batch, -1)) for name, codes in codes_RD.items()})
        x_RE = x_RE.flatten(0, 1)
        for layer in self.layers[self.config.teacher_layer :]:
            layer(x_RE, batch)
        if self.config.teacher_layer < len(self.layers):
            x_RE = x_RE + layer.shift_after.to(self.dtype)
        return self.head(self.post_layernorm(x_RE.unflatten(0, (batch, -1))))

    def embed(self, codes: Tensor, stream: str) -> Tensor:
        """As DualToken.embed: (..., D) ints -> (..., C) fp32."""
        return sum_of_codes(self.codebooks[stream], codes)

    def preprocess(self, image: Image.Image) -> Tensor:
        """As DualToken.preprocess."""
        return to_tensor(centre_crop(image, self.config.image_size))

    @torch.no_grad()
    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """As DualToken.decode; images in `dtype`, channels last."""
        check_picture_codes(codes, self.config)
        with sdpa_kernel(BACKENDS, set_priority=True):
            x = self._feed("picture", {name: each.flatten(1, 2) for name, each in codes.items()})
            x = x.transpose(1, 2).unflatten(2, self.config.grid)  # channels last as it lies
            latent = (self.config.decoder_latent,) * 2
            if x.shape[2:] != latent:
                x = F.interpolate(x, size=latent, mode="bilinear")
            return self.run_decoder(x.contiguous(memory_format=torch.channels_last)).clamp(-1, 1)
