"""Inputs of the released sizes for a run without data: codebooks, a text vocabulary, shards of random documents.

`python -m megadual.synthetic.inputs --output DIR` writes DIR/dualtoken, DIR/text_tokenizer and DIR/shards, with which
pretrain.py trains as with real ones. The documents are pairs of a caption and an image of random ids and codes.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megadual.errors import command
from megadual.streams import END_OF_TEXT, SPECIAL_TOKENS, Marks
from megadual.testing.shards import random_documents, write_shard_set
from megadual.text import fingerprint, save_text_tokenizer
from megadual.vision import CodebookSet, read_codebooks
from megadual.vision.presets import preset


def write_codebooks(folder: Path, name: str, seed: int) -> CodebookSet:
    """A DualToken's folder that holds its config and random codebooks alone; returns what `read_codebooks` reads."""
    config = preset(name)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder)
    generator = torch.Generator().manual_seed(seed)
    save_file(
        {
            f"quantizers.{stream.name}.codebooks.0.weight": torch.randn(
                stream.codebook_size + 1, stream.code_dim, generator=generator
            )
            for stream in config.code_streams
        },
        folder / "model.safetensors",
    )
    return read_codebooks(folder)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` ids: the special tokens, bytes, and made-up words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL_TOKENS, *alphabet]
    words += [f"word{i}" for i in range(size - len(words))]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, additional_special_tokens=list(SPECIAL_TOKENS)
    )


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dualtoken", default="siglip2-so400m-384-rvq8", help="preset whose sizes are taken")
    parser.add_argument("--text-vocabulary", type=int, default=151_936)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--caption", type=int, nargs=2, default=(200, 1000), help="least and most tokens of a caption")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    codebooks = write_codebooks(args.output / "dualtoken", args.dualtoken, args.seed)
    tokenizer = word_tokenizer(args.text_vocabulary)
    save_text_tokenizer(tokenizer, args.output / "text_tokenizer")
    documents = random_documents(
        args.documents,
        args.seed,
        codebooks.grid,
        streams=codebooks.streams,
        vocabulary=args.text_vocabulary,
        caption=tuple(args.caption),
        special=Marks.of(tokenizer),
    )
    write_shard_set(
        args.output / "shards",
        documents,
        dualtoken={"fingerprint": codebooks.fingerprint},
        text_tokenizer={"fingerprint": fingerprint(tokenizer)},
        shard_bytes=1 << 26,
        marks=Marks.of(tokenizer),
    )
    print(f"{args.documents} documents and their tokenizers in {args.output}")


if __name__ == "__main__":
    main()
