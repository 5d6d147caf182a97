"""Text tokenizers: loading one with MegaDual's special tokens, training a small one, fingerprints.

`python -m megadual.text --captions 'runs/demo/corpus/train-*.tar' --vocab-size 1024 --output DIR`
"""

import hashlib
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megadual.errors import UserError
from megadual.streams import SPECIAL_TOKENS


def load_text_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """A HF tokenizer from a local folder or hub id, with SPECIAL_TOKENS added where it lacks them."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"no text tokenizer in '{folder}': {str(error).splitlines()[0]}") from error
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of the tokenizer's vocabulary and rules: equal for equal ids, whatever folder it came from."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
