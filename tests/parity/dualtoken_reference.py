"""The authors' tokenizer in its plainest form: a state dict in, tensors out, nothing of megadual.

Written from paper sections A1 to A3 and from the behaviour of the published code. Attention is softmax(q k / sqrt(d)) v
with an explicit mask, distances are whole matrices, every norm's epsilon is spelt out.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel


def siglip(image_size, patch_size, hidden, layers, heads=2):
    tower = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": heads}
    text = {**tower, "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 8, "projection_size": hidden}
    text |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**tower, "num_hidden_layers": layers, "image_size": image_size, "patch_size": patch_size}
    return SiglipConfig(text_config=text, vision_config=vision)


def published_config(siglip_config, sem, pix, decoder, layers, shared=True, latent=None, weight=0.6, resolution=None):
    """The JSON as the authors write it; sem and pix are (codes, width, depth), layers (recon, sem, shortcut)."""
    vision = siglip_config.vision_config
    grid = vision.image_size // vision.patch_size

    def quantizer(codes, width, depth, kind):
        return {
            "bottleneck_type": kind,
            "ckpt_path": None,
            "code_shape": [grid, grid, depth],
            "decay": 0.99,
            "embed_dim": width,
            "latent_shape": [grid, grid, width],
            "n_embed": codes,
            "restart_unused_codes": True,
            "shared_codebook": shared,
        }

    return {
        "model_type": "rqvaesigliptransformer_model",
        "hidden_size": vision.hidden_size,
        "rqvaesiglip": {
            "model_type": "rqvaesiglip_model",
            "hidden_size": vision.hidden_size,
            "layer_recon": layers[0],
            "layer_sem": layers[1],
            "layer_shortcut": layers[2],
            "weight_shortcut": weight,
            "ddconfig": {
                "ch": 32,
                "out_ch": 3,
                "double_z": False,
                "dropout": 0.0,
                "in_channels": 3,
                "resolution": resolution or vision.image_size,
                **decoder,
            },
            "decoder_latent_shape": latent,
            "checkpointing": True,
            "vq_sem": quantizer(*sem, "rq_ema"),
            "vq_pix": quantizer(*pix, "rq"),
            "pretrained_model": "$MODELS/some-siglip",
        },
    }


def random_weights(config, siglip_config, seed=0):
    """Weights under the published names. Scaled so that no stage blows up or dies."""
    config, state, generator = config["rqvaesiglip"], {}, torch.Generator().manual_seed(seed)
    hidden = config["hidden_size"]

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    def linear(name, fan_in, fan_out, kernel=(), bias=True):
        state[f"{name}.weight"] = normal(fan_out, fan_in, *kernel, scale=(fan_in * math.prod(kernel)) ** -0.5)
        if bias:
            state[f"{name}.bias"] = normal(fan_out, scale=0.1)

    def norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + normal(width, scale=0.2), normal(width, scale=0.2)

    def projection(name, fan_in, fan_out):
        inner = max(fan_in, fan_out)
        norm(f"{name}.norm1", fan_in)
        linear(f"{name}.attn.qkv", fan_in, 3 * inner, bias=False)
        state[f"{name}.attn.q_bias"], state[f"{name}.attn.v_bias"] = normal(inner), normal(inner)
        state[f"{name}.attn.zero_k_bias"] = torch.zeros(inner)
        linear(f"{name}.attn.proj", fan_out, fan_out)
        linear(f"{name}.proj", fan_in, fan_out)
        norm(f"{name}.norm3", fan_in)
        norm(f"{name}.norm2", fan_out)
        norm(f"{name}.mlp.norm", fan_out)
        linear(f"{name}.mlp.w0", fan_out, 2 * fan_out)
        linear(f"{name}.mlp.w1", fan_out, 2 * fan_out)
        linear(f"{name}.mlp.w2", 2 * fan_out, fan_out)

    def resnet(name, fan_in, fan_out, first=3):
        norm(f"{name}.norm1", fan_in)
        linear(f"{name}.conv1", fan_in, fan_out, (first, first))
        norm(f"{name}.norm2", fan_out)
        linear(f"{name}.conv2", fan_out, fan_out, (3, 3))
        if fan_in != fan_out:
            linear(f"{name}.nin_shortcut", fan_in, fan_out, (1, 1))

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            linear(f"{name}.{part}", width, width, (1, 1))

    torch.manual_seed(seed)
    backbone = SiglipModel(siglip_config)
    for name, tensor in backbone.state_dict().items():  # HF starts biases at 0 and most weights near it
        state[f"siglip_model.{name}"] = tensor + normal(*tensor.shape, scale=0.05)
    for stream in ("sem", "pix"):
        part = config[f"vq_{stream}"]
        width, codes = part["embed_dim"], part["n_embed"]
        projection(f"prequant_{stream}", hidden, width)
        projection(f"postquant_{stream}", width, hidden)
        books = [normal(codes + 1, width) for _ in range(part["code_shape"][2])]
        for depth in range(len(books)):
            book = books[0 if part["shared_codebook"] else depth] / (1 + depth * (not part["shared_codebook"]))
            prefix = f"quantizer_{stream}.codebooks.{depth}"
            state[f"{prefix}.weight"], state[f"{prefix}.embed_ema"] = book, book[:-1].clone()
            state[f"{prefix}.cluster_size_ema"] = torch.ones(codes)
    if config["layer_shortcut"] is not None:
        projection("prequant_shortcut", hidden, config["vq_pix"]["embed_dim"])

    decoder = config["ddconfig"]
    widths = [decoder["ch"] * m for m in decoder["ch_mult"]]
    resnet("post_quant_conv", hidden, decoder["decoder_in_channels"], first=1)
    linear("decoder.conv_in", decoder["decoder_in_channels"], widths[-1], (3, 3))
    resnet("decoder.mid.block_1", widths[-1], widths[-1])
    attention("decoder.mid.attn_1", widths[-1])
    resnet("decoder.mid.block_2", widths[-1], widths[-1])
    width, resolution = widths[-1], decoder["resolution"] // 2 ** (len(widths) - 1)
    for level in reversed(range(len(widths))):
        for block in range(decoder["num_res_blocks"] + 1):
            resnet(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
            if resolution in decoder["attn_resolutions"]:
                attention(f"decoder.up.{level}.attn.{block}", width)
        if level:
            linear(f"decoder.up.{level}.upsample.conv", width, width, (3, 3))
            resolution *= 2
    norm("decoder.norm_out", width)
    linear("decoder.conv_out", width, 3, (3, 3))
    return state


@dataclass
class Output:
    semantic: torch.Tensor  # (B, rows, columns, depth)
    pixel: torch.Tensor
    pooled: torch.Tensor
    reconstruction: torch.Tensor


class Reference:
    def __init__(self, config, siglip_config, state):
        self.config, self.w = config["rqvaesiglip"], state
        self.siglip = SiglipModel(siglip_config).eval()
        prefix = "siglip_model."
        self.siglip.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def layer_norm(self, name, x, eps):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + eps).sqrt() * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def projection(self, name, x, out, causal):
        batch, positions, width = x.shape
        narrow, inner = min(width, out), max(width, out)
        heads = inner // narrow
        bias = torch.cat([self.w[f"{name}.attn.q_bias"], torch.zeros(inner), self.w[f"{name}.attn.v_bias"]])
        qkv = self.layer_norm(f"{name}.norm1", x, 1e-5) @ self.w[f"{name}.attn.qkv.weight"].T + bias
        q, k, v = (t.reshape(batch, positions, heads, inner // heads).transpose(1, 2) for t in qkv.split(inner, dim=-1))
        scores = q @ k.transpose(2, 3) / math.sqrt(inner // heads)
        if causal:
            scores = scores.masked_fill(torch.ones(positions, positions).triu(1).bool(), -torch.inf)
        a = scores.softmax(-1) @ v
        a = a.mean(dim=1) if width > out else a.transpose(1, 2).reshape(batch, positions, inner)
        y = self.linear(f"{name}.proj", self.layer_norm(f"{name}.norm3", x, 1e-5)) + self.linear(f"{name}.attn.proj", a)
        h = self.layer_norm(f"{name}.mlp.norm", self.layer_norm(f"{name}.norm2", y, 1e-5), 1e-6)
        gate = F.gelu(self.linear(f"{name}.mlp.w0", h), approximate="tanh")
        return y + self.linear(f"{name}.mlp.w2", gate * self.linear(f"{name}.mlp.w1", h))

    def quantize(self, stream, x):
        residual, total, codes = x.clone(), torch.zeros_like(x), []
        for depth in range(self.config[f"vq_{stream}"]["code_shape"][2]):
            book = self.w[f"quantizer_{stream}.codebooks.{depth}.weight"][:-1]
            distances = residual.square().sum(-1, keepdim=True) - 2 * residual @ book.T + book.square().sum(-1)
            code = distances.argmin(-1)
            residual, total = residual - book[code], total + book[code]
            codes.append(code)
        return total, torch.stack(codes, dim=-1)

    def group_norm(self, name, x):
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)

    def conv(self, name, x):
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def resnet(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.group_norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.group_norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def attention(self, name, x):
        h = self.group_norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B, channels, positions)
        weights = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(dim=-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(x.shape))

    def decode(self, quantized):
        x = self.projection("postquant_pix", quantized, self.config["hidden_size"], causal=True)
        side = math.isqrt(x.shape[1])
        x = x.transpose(1, 2).reshape(len(x), -1, side, side)
        if self.config["decoder_latent_shape"] is not None:
            x = F.interpolate(x, self.config["decoder_latent_shape"], mode="bilinear", align_corners=False)
        x = self.conv("decoder.conv_in", self.resnet("post_quant_conv", x))
        x = self.resnet("decoder.mid.block_1", x)
        x = self.resnet("decoder.mid.block_2", self.attention("decoder.mid.attn_1", x))
        decoder = self.config["ddconfig"]
        resolution = decoder["resolution"] // 2 ** (len(decoder["ch_mult"]) - 1)
        for level in reversed(range(len(decoder["ch_mult"]))):
            for block in range(decoder["num_res_blocks"] + 1):
                x = self.resnet(f"decoder.up.{level}.block.{block}", x)
                if resolution in decoder["attn_resolutions"]:
                    x = self.attention(f"decoder.up.{level}.attn.{block}", x)
            if level:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"decoder.up.{level}.upsample.conv", x)
                resolution *= 2
        return self.conv("decoder.conv_out", F.silu(self.group_norm("decoder.norm_out", x)))

    @torch.no_grad()
    def __call__(self, images):
        vision, config = self.siglip.vision_model, self.config
        states = vision(images, output_hidden_states=True).hidden_states  # [0] is what the embeddings give
        widths = {stream: config[f"vq_{stream}"]["embed_dim"] for stream in ("sem", "pix")}
        pix = self.projection("prequant_pix", states[config["layer_recon"]], widths["pix"], causal=False)
        if config["layer_shortcut"] is not None:
            shortcut = self.projection(
                "prequant_shortcut", states[config["layer_shortcut"]], widths["pix"], causal=False
            )
            pix = pix + config["weight_shortcut"] * shortcut
        sem = self.projection("prequant_sem", states[config["layer_sem"]], widths["sem"], causal=False)
        quantized_pix, pixel = self.quantize("pix", pix)
        quantized_sem, semantic = self.quantize("sem", sem)
        x = self.projection("postquant_sem", quantized_sem, config["hidden_size"], causal=True)
        for layer in vision.encoder.layers[config["layer_sem"] :]:
            x = layer(x, attention_mask=None)
        pooled = vision.head(vision.post_layernorm(x))
        side = math.isqrt(x.shape[1])
        grids = (codes.unflatten(1, (side, side)) for codes in (semantic, pixel))
        return Output(*grids, pooled, self.decode(quantized_pix))
