"""A DualToken in its authors' two files, JSON config and .pt weights, as a folder of ours.

`python checkpoints_tools/import_dualtoken.py --config config.json --weights weights.pt [--siglip FOLDER] --output DIR`

Sizes are free. The SigLIP's come from FOLDER/config.json, else from the local folder that the JSON's
`pretrained_model` names, else from the shapes of the weights. Every tensor must have its place: what is missing, left
over or misshapen is listed by name and nothing is written.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadual.errors import UserError, command, first_line
from megadual.vision import DualToken, DualTokenConfig, StreamConfig
from megadual.vision.config import read_siglip_config
from megadual.vision.presets import siglip_from_shapes

# The authors' name of a module -> ours.
MODULES = {
    "prequant_sem": "prequant.semantic.0",
    "prequant_pix": "prequant.pixel.0",
    "prequant_shortcut": "prequant.pixel.1",
    "quantizer_sem": "quantizers.semantic",
    "quantizer_pix": "quantizers.pixel",
    "postquant_sem": "postquant.semantic.teacher",
    "postquant_pix": "postquant.pixel.picture",
}
TIMINGS = {"rq": "per_depth", "rq_ema": "per_step"}
# What the published decoders all are, and our decoder only is.
DECODER_FIXED = {"out_ch": 3, "dropout": 0.0, "resamp_with_conv": True, "give_pre_end": False}
# Older transformers stored this constant range beside the position embeddings.
IGNORED = re.compile(r"siglip_model\.(text|vision)_model\.embeddings\.position_ids")


def take(section: dict[str, Any], name: str, place: str) -> Any:
    if name not in section:
        raise UserError(f"config: '{place}' has no '{name}'; is this the authors' config.json?")
    return section[name]


def read_json(path: Path) -> dict[str, Any]:
    """The config's `rqvaesiglip` part, which describes the tokenizer."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--config '{path}' can't be read as JSON: {error}") from error
    return take(config, "rqvaesiglip", str(path))


def read_weights(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict without DistributedDataParallel's prefix, and the names of what lies beside it in the file."""
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # of unpickling tensors and nothing else: whatever wrong bytes lead to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--weights '{path}' can't be read as tensors: {reason}") from error
    state = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    if not isinstance(state, dict) or not state or not all(map(_is_entry, state.items())):
        raise UserError(f"--weights '{path}' holds no state dict, neither by itself nor under 'state_dict'")
    beside = sorted(set(stored) - {"state_dict"}) if state is not stored else []
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}, beside


def _is_entry(entry: tuple[Any, Any]) -> bool:
    return isinstance(entry[0], str) and isinstance(entry[1], Tensor)


def siglip_config(folder: Path | None, rqvaesiglip: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """SiglipConfig.to_dict() of the backbone; UserError where neither a folder nor the weights tell it."""
    if folder is not None and not (folder / "config.json").is_file():
        raise UserError(f"--siglip '{folder}' holds no config.json")
    named = Path(rqvaesiglip.get("pretrained_model") or "")
    if folder is None and (named / "config.json").is_file():
        folder = named
    if folder is not None:
        try:
            return read_siglip_config(folder).to_dict()
        except Exception as error:  # of transformers' checks
            raise UserError(f"'{folder / 'config.json'}' is no SigLIP's: {first_line(error)}") from error
    prefix, decoder = "siglip_model.", take(rqvaesiglip, "ddconfig", "rqvaesiglip")
    shapes = {name.removeprefix(prefix): tuple(x.shape) for name, x in state.items() if name.startswith(prefix)}
    try:
        return siglip_from_shapes(shapes, take(decoder, "resolution", "ddconfig"))
    except KeyError as error:
        raise UserError(f"the sizes of SigLIP can't be read off the weights ({error}); give --siglip FOLDER") from error


def stream_sizes(rqvaesiglip: dict[str, Any], name: str) -> dict[str, Any]:
    """The sizes of the quantiser that they call `name`, under our names."""
    section = take(rqvaesiglip, name, "rqvaesiglip")
    *grid, depth = take(section, "code_shape", name)
    *latent, code_dim = take(section, "latent_shape", name)
    if grid != latent or code_dim != section.get("embed_dim", code_dim):
        raise UserError(
            f"config: {name} has code_shape {[*grid, depth]}, latent_shape {[*latent, code_dim]} and embed_dim "
            f"{section.get('embed_dim')}; only one code per position, as wide as embed_dim, can be imported"
        )
    shared, size = bool(section.get("shared_codebook", False)), take(section, "n_embed", name)
    sizes, decays = (set(x) if isinstance(x, list) else {x} for x in (size, section.get("decay", 0.99)))
    if len(sizes) > 1 or len(decays) > 1:
        raise UserError(
            f"config: {name} has n_embed {size} and decay {sorted(decays)}; both must be one for all depths"
        )
    kind = section.get("bottleneck_type")
    if kind not in TIMINGS:
        raise UserError(f"config: {name}.bottleneck_type is '{kind}', must be one of {sorted(TIMINGS)}")
    return {
        "codebook_size": sizes.pop(),
        "code_dim": code_dim,
        "depth": depth,
        "shared_codebook": shared,
        "decay": decays.pop(),
        "restart_unused_codes": bool(section.get("restart_unused_codes", True)),
        "timing": TIMINGS[kind],
    }


def dualtoken_config(rqvaesiglip: dict[str, Any], siglip: dict[str, Any]) -> DualTokenConfig:
    """Our config of the authors' one; UserError names what ours has no place for."""
    decoder = take(rqvaesiglip, "ddconfig", "rqvaesiglip")
    for name, value in DECODER_FIXED.items():
        if decoder.get(name, value) != value:
            raise UserError(f"config: ddconfig.{name} is {decoder[name]}, only {value} can be imported")
    multipliers = list(take(decoder, "ch_mult", "ddconfig"))
    vision = siglip["vision_config"]
    grid = vision["image_size"] // vision["patch_size"]
    latent = rqvaesiglip.get("decoder_latent_shape") or [grid, grid]
    if latent[0] != latent[1]:
        raise UserError(f"config: decoder_latent_shape {latent} is not square, as images are here")
    if take(rqvaesiglip, "hidden_size", "rqvaesiglip") != vision["hidden_size"]:
        raise UserError(f"config: hidden_size {rqvaesiglip['hidden_size']} != SigLIP's {vision['hidden_size']}")
    # Theirs places attention by the resolutions that ddconfig states, whatever the latent's true side.
    stated = take(decoder, "resolution", "ddconfig") // 2 ** (len(multipliers) - 1)
    attended = take(decoder, "attn_resolutions", "ddconfig")
    attention = [latent[0] * 2**level for level in range(len(multipliers)) if stated * 2**level in attended]
    deep, shallow = [take(rqvaesiglip, "layer_sem", "rqvaesiglip")], [take(rqvaesiglip, "layer_recon", "rqvaesiglip")]
    weights = []
    if rqvaesiglip.get("layer_shortcut") is not None:
        shallow.append(rqvaesiglip["layer_shortcut"])
        weights = [1.0, take(rqvaesiglip, "weight_shortcut", "rqvaesiglip")]
    config = DualTokenConfig(
        siglip=siglip,
        streams={
            "semantic": StreamConfig(layers=deep, feeds=["teacher"], **stream_sizes(rqvaesiglip, "vq_sem")),
            "pixel": StreamConfig(
                layers=shallow, weights=weights, feeds=["picture"], **stream_sizes(rqvaesiglip, "vq_pix")
            ),
        },
        decoder_latent=latent[0],
        decoder_in_channels=take(decoder, "decoder_in_channels", "ddconfig"),
        decoder_channels=take(decoder, "ch", "ddconfig"),
        decoder_multipliers=multipliers,
        decoder_res_blocks=take(decoder, "num_res_blocks", "ddconfig"),
        decoder_attention=attention,
    )
    try:
        return config.check()
    except ValueError as error:
        raise UserError(f"config: {error}") from error


def _theirs(name: str) -> str:
    """Our name of a tensor in the authors' layout."""
    for theirs, ours in MODULES.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def build(config: DualTokenConfig, state: dict[str, Tensor]) -> DualToken:
    """A DualToken that holds exactly these tensors; UserError lists each that has no place or the wrong shape."""
    with torch.device("meta"):
        model = DualToken(config)
    names = {_theirs(name): name for name in model.state_dict()}
    expected = {theirs: tuple(model.state_dict()[ours].shape) for theirs, ours in names.items()}
    problems = [f"missing: {name} {expected[name]}" for name in sorted(expected.keys() - state.keys())]
    problems += [
        f"without a place: {name} {tuple(state[name].shape)}" for name in sorted(state.keys() - expected.keys())
    ]
    problems += [
        f"misshapen: {name} is {tuple(state[name].shape)}, the config makes it {expected[name]}"
        for name in sorted(expected.keys() & state.keys())
        if tuple(state[name].shape) != expected[name]
    ]
    if problems:
        raise UserError(f"weights and config do not fit, {len(problems)} tensors differ:\n" + "\n".join(problems))
    model.load_state_dict({names[name]: tensor for name, tensor in state.items()}, assign=True)
    return model


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the authors' config.json")
    parser.add_argument("--weights", type=Path, required=True, help="the authors' .pt file")
    parser.add_argument("--siglip", type=Path, help="folder with the SigLIP's config.json")
    parser.add_argument("--output", type=Path, required=True, help="folder for DualToken.from_pretrained")
    args = parser.parse_args(argv)

    rqvaesiglip = read_json(args.config)
    state, beside = read_weights(args.weights)
    ignored = [name for name in state if IGNORED.fullmatch(name)]
    siglip = siglip_config(args.siglip, rqvaesiglip, state)
    config = dualtoken_config(rqvaesiglip, siglip)
    model = build(config, {name: tensor for name, tensor in state.items() if name not in ignored})
    model.save_pretrained(args.output)

    if beside:
        print(f"ignored beside the state dict: {', '.join(beside)}")
    if ignored:
        print(f"ignored tensors: {', '.join(ignored)}")
    rows, columns = config.grid
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{args.output}: {len(state) - len(ignored)} tensors, {parameters:.1f} M parameters, {config.image_size} px, "
        f"{rows} x {columns} positions, fingerprint {model.fingerprint()}"
    )


if __name__ == "__main__":
    main()
