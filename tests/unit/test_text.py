"""Text tokenizers: training, saving, fingerprints, special tokens."""

import io
import json
import tarfile

import pytest

from megadual import text
from megadual.errors import UserError
from megadual.streams import SPECIAL_TOKENS, SpecialIds
from megadual.synthetic.corpus import make_corpus
from megadual.synthetic.files import write_tar

CAPTIONS = ["two red apples to the left of a cat, on blue", "a large cat above two small dogs, on green"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    text.save_text_tokenizer(text.train_text_tokenizer(CAPTIONS, 300), folder)
    return folder


def test_any_text_comes_back(folder):
    tokenizer = text.load_text_tokenizer(folder)
    for words in (*CAPTIONS, "Größe — 漢字 🦊\n\ttabs  and  spaces "):
        assert tokenizer.decode(tokenizer(words, add_special_tokens=False).input_ids) == words


def test_special_tokens_are_single_ids(folder):
    tokenizer = text.load_text_tokenizer(folder)
    assert len(tokenizer) <= 300  # loading added none
    special = SpecialIds.of(tokenizer)
    assert len(set(vars(special).values())) == len(SPECIAL_TOKENS)
    assert tokenizer("<image>").input_ids == [special.image]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == special.end_of_text
    assert tokenizer.decode(tokenizer("<image>a cat<|endoftext|>").input_ids, skip_special_tokens=True) == "a cat"


def test_same_captions_same_tokenizer(folder):
    again = text.train_text_tokenizer(CAPTIONS, 300)
    assert text.fingerprint(again) == text.fingerprint(text.load_text_tokenizer(folder))
    assert text.fingerprint(text.train_text_tokenizer(CAPTIONS, 280)) != text.fingerprint(again)


def test_fingerprint_does_not_depend_on_use(folder):
    tokenizer = text.load_text_tokenizer(folder)
    before = text.fingerprint(tokenizer)
    tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=8)
    assert text.fingerprint(tokenizer) == before


def test_saved_for_transformers_4_too(folder):
    """transformers 4 knows neither the class name nor the list of extra tokens that 5 writes."""
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in saved
    assert set(saved["additional_special_tokens"]) < set(SPECIAL_TOKENS)


def test_tokens_are_added_to_a_tokenizer_without_them(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"cat": 0, "?": 1}, unk_token="?")))
    bare.save_pretrained(tmp_path)
    tokenizer = text.load_text_tokenizer(tmp_path)
    assert sorted(vars(SpecialIds.of(tokenizer)).values()) == list(range(2, 2 + len(SPECIAL_TOKENS)))


def test_mistakes(tmp_path, capsys):
    with pytest.raises(UserError, match="vocab_size 100"):
        text.train_text_tokenizer(CAPTIONS, 100)
    with pytest.raises(UserError, match="no text tokenizer in"):
        text.load_text_tokenizer(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        text.main(["--captions", str(tmp_path / "*.tar"), "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "matches no file" in capsys.readouterr().err


def test_command_trains_on_tars(tmp_path):
    make_corpus(tmp_path, train=20, heldout=1, size=16)
    text.main(["--captions", f"{tmp_path}/train-*.tar", "--vocab-size", "320", "--output", str(tmp_path / "out")])
    tokenizer = text.load_text_tokenizer(tmp_path / "out")
    assert 263 < len(tokenizer) <= 320
    assert len(tokenizer(", on blue", add_special_tokens=False).input_ids) < len(", on blue")


def test_conversations_and_stories_are_read_too(tmp_path):
    make_corpus(tmp_path, train=2, questions=3, stories=2, heldout=1, size=16)
    texts = list(text.read_captions(f"{tmp_path}/*train-*.tar"))
    assert any(each.endswith("?") for each in texts) and any(each.startswith("Here we see") for each in texts)
    assert not any("<image>" in each or not each for each in texts)


def test_folders_in_a_tar_are_passed_over_and_a_broken_one_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("some.txt")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        entry = tarfile.TarInfo("some.txt/a.txt")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"a cat"))
    assert list(text.read_captions(str(tmp_path / "a.tar"))) == ["a cat"]
    write_tar(tmp_path / "c.tar", [("a.json", b"[]")])
    for data, reason in (
        ((tmp_path / "a.tar").read_bytes()[:1100], "b.tar' can't be read as a tar: "),
        (b"no tar", "b.tar' can't be read as a tar: "),
        ((tmp_path / "c.tar").read_bytes(), "'a.json' of '.*b.tar' is not JSON of texts"),
    ):
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(UserError, match=reason):
            list(text.read_captions(str(tmp_path / "b.tar")))
