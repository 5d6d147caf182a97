"""Text tokenizers: loading one with MegaDual's special tokens, training a small one, fingerprints.

`python -m megadual.text --captions 'runs/demo/corpus/*train-*.tar' --vocab-size 1024 --output DIR`
"""

import argparse
import glob
import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megadual.errors import UserError, command, first_line
from megadual.streams import END_OF_TEXT, IMAGE, SPECIAL_TOKENS
from megadual.tars import tar_members


def load_text_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """A HF tokenizer from a local folder or hub id, with SPECIAL_TOKENS added where it lacks them."""
    try:
        # An exported folder has code of its own, but not of its tokenizer; otherwise transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"no text tokenizer in '{folder}': {first_line(error)}") from error
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer  # type: ignore[return-value]  # transformers has slow ones as well, for other files


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of the tokenizer's vocabulary and rules: equal for equal ids, whatever folder it came from.

    Leaves out what decides no id: padding and truncation, which calls set, and the decoder and offsets, which
    differ between transformers 4 and 5.
    """
    state = json.loads(
        tokenizer.backend_tokenizer.to_str(),
        object_hook=lambda part: {name: value for name, value in part.items() if name != "trim_offsets"},
    )
    rules = {name: state[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def train_text_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A small byte-level BPE for tiny models, of at most `vocab_size` ids, SPECIAL_TOKENS first.

    Any text can be encoded and is decoded to itself; the same captions in the same order give the same tokenizer.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} is too small: the bytes and special tokens alone take {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token != END_OF_TEXT],
        clean_up_tokenization_spaces=False,
    )


def save_text_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Save a tokenizer so that transformers 4 and 5 both load the folder.

    transformers 5 writes a class name and a key that 4 does not know, but reads those of 4. The class is the general
    one for Qwen's tokenizer too: all that it does is in tokenizer.json.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(saved.get("extra_special_tokens"), list):
        saved["additional_special_tokens"] = saved.pop("extra_special_tokens")
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n")


def read_captions(pattern: str) -> Iterator[str]:
    """The texts of the webdataset tars that match a glob, in order: captions (KEY.txt), and what KEY.json holds of
    conversations (LLaVA's) and of interleaved documents.
    """
    tars = sorted(glob.glob(pattern))
    if not tars:
        raise UserError(f"--captions '{pattern}' matches no file")
    for path in tqdm(tars, desc="captions", unit="tar", mininterval=1):
        try:
            with open(path, "rb") as stream:
                for member in tar_members(stream, path):
                    if member["fname"].endswith(".txt"):
                        yield member["data"].decode("utf-8", errors="replace").strip()
                    elif member["fname"].endswith(".json"):
                        yield from _described(member, path)
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"--captions: '{path}' can't be read as a tar: {error}") from error


def _described(member: dict, path: str) -> Iterator[str]:
    try:
        yield from _texts(json.loads(member["data"]))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--captions: '{member['fname']}' of '{path}' is not JSON of texts: {error}") from error


def _texts(sample: dict) -> Iterator[str]:
    """Of a conversation or an interleaved document, without what stands for its images."""
    said = [turn["value"] for turn in sample.get("conversations", [])] + sample.get("texts", [])
    yield from (text.replace(IMAGE, "").strip() for text in said if text)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small text tokenizer on the texts of webdataset tars.")
    parser.add_argument("--captions", required=True, help="glob of .tar files")
    parser.add_argument("--vocab-size", type=int, default=1024, help="ids, the special tokens included")
    parser.add_argument("--output", required=True, help="folder of the HF tokenizer")
    args = parser.parse_args(argv)
    tokenizer = train_text_tokenizer(read_captions(args.captions), args.vocab_size)
    save_text_tokenizer(tokenizer, args.output)
    print(f"{len(tokenizer)} ids, fingerprint {fingerprint(tokenizer)[:12]}, saved to {args.output}")


if __name__ == "__main__":
    main()
