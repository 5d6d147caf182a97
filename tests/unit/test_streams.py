"""How documents become positions."""

import numpy as np
import pytest

from megadual.data.layout import IGNORE, Reading, to_sequence
from megadual.streams import Document, ImageUse, Role, Stream, TurnBit, check_stream_names, mds_columns
from megadual.testing.shards import SPECIAL, random_documents

EOS, IMG, START, END, GEN, GEN_END = (
    SPECIAL.end_of_text, SPECIAL.image, SPECIAL.image_start, SPECIAL.image_end,
    SPECIAL.image_gen_start, SPECIAL.image_gen_end,
)  # fmt: skip


def pair(caption=(20, 21)):
    """Two positions of a stream of two codes and of one of a single code."""
    codes = {"a": np.array([[1, 2], [3, 4]], dtype=np.uint16), "b": np.array([[11], [13]], dtype=np.uint16)}
    grids = np.array([[1, 2]], dtype=np.uint16)
    turns = np.array([[1 + len(caption), Role.CAPTION, TurnBit.LOSS]], dtype=np.uint32)
    return Document("k", np.array([IMG, *caption], dtype=np.uint32), codes, grids, turns=turns).check(SPECIAL)


def test_describe():
    sequence = to_sequence(pair(), SPECIAL, Reading((False,)))
    assert sequence.tokens.tolist() == [START, IMG, IMG, END, 20, 21, EOS]
    assert sequence.text_targets.tolist() == [IGNORE, IGNORE, END, 20, 21, EOS, IGNORE]
    assert not sequence.draw_loss.any()
    assert sequence.codes["a"].tolist() == [[0, 0], [1, 2], [3, 4], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert sequence.codes["b"].tolist() == [[0], [11], [13], [0], [0], [0], [0]]


def test_draw():
    sequence = to_sequence(pair(), SPECIAL, Reading((True,)))
    assert sequence.tokens.tolist() == [20, 21, GEN, IMG, IMG, GEN_END, EOS]
    assert sequence.text_targets.tolist() == [21, GEN, IGNORE, IGNORE, GEN_END, EOS, IGNORE]
    assert sequence.draw_loss.tolist() == [False, False, False, True, True, False, False]


def test_caption_dropout_leaves_the_image_alone():
    sequence = to_sequence(pair(), SPECIAL, Reading((True,), drop_text=True))
    assert sequence.tokens.tolist() == [GEN, IMG, IMG, GEN_END, EOS]
    looked_at = to_sequence(pair(), SPECIAL, Reading((False,), drop_text=True))
    assert 20 in looked_at.tokens  # only a drawn pair can lose its caption


def test_interleaved_documents_keep_their_order():
    codes = {"a": np.arange(6, dtype=np.uint16).reshape(3, 2)}
    document = Document(
        "k", np.array([30, IMG, 31, IMG], dtype=np.uint32), codes, np.array([[1, 1], [2, 1]], dtype=np.uint16)
    )
    sequence = to_sequence(document.check(SPECIAL), SPECIAL, Reading((False, True)))
    assert sequence.tokens.tolist() == [30, START, IMG, END, 31, GEN, IMG, IMG, GEN_END, EOS]
    assert np.flatnonzero(sequence.draw_loss).tolist() == [6, 7]


def conversation():
    """A question about an image, its answer with a drawing, a word on that, the last answer."""
    user, assistant = Role.USER, Role.ASSISTANT
    turns = [[3, user, TurnBit.DROPPABLE], [5, assistant, TurnBit.LOSS], [6, user, 0], [8, assistant, TurnBit.LOSS]]
    return Document(
        "c", np.array([IMG, 20, 21, 30, IMG, 22, 31, 32], dtype=np.uint32),
        {"a": np.array([[1], [2], [3]], dtype=np.uint16)}, np.array([[1, 1], [1, 2]], dtype=np.uint16),
        turns=np.array(turns, dtype=np.uint32),
        image_use=np.array([ImageUse.LOOKED_AT | ImageUse.DROPPABLE, ImageUse.DRAWN], dtype=np.uint8),
    ).check(SPECIAL)  # fmt: skip


USER, ASSISTANT = (SPECIAL.headers[role].tolist() for role in (Role.USER, Role.ASSISTANT))
STOP, NEWLINE = SPECIAL.im_end, SPECIAL.newline.tolist()
FIRST = [*USER, START, IMG, END, 20, 21, STOP, *NEWLINE, *ASSISTANT]
ANSWER, LAST = [30, GEN, IMG, IMG, GEN_END, STOP], [31, 32, STOP]
BETWEEN = [*NEWLINE, *USER, 22, STOP, *NEWLINE, *ASSISTANT]


@pytest.mark.parametrize("loss, learned, drawn", [
    ("assistant", [*ANSWER, *LAST], 2), ("last_turn", LAST, 0), ("none", [], 2),
    ("full", [*FIRST[1:], *ANSWER, *BETWEEN, *LAST, *NEWLINE, EOS], 2),
])  # fmt: skip
def test_losses_fall_on_what_the_turns_say(loss, learned, drawn):
    sequence = to_sequence(conversation(), SPECIAL, Reading((False, False), loss=loss))
    assert sequence.tokens.tolist() == [*FIRST, *ANSWER, *BETWEEN, *LAST, *NEWLINE, EOS]
    targets = sequence.text_targets[sequence.text_targets != IGNORE]
    assert targets.tolist() == [token for token in learned if token != IMG]
    assert sequence.draw_loss.sum() == drawn
    positions = np.flatnonzero(sequence.text_targets != IGNORE)
    assert (sequence.tokens[positions + 1] == targets).all()  # each is of the position before it
    drawing = len(FIRST) + ANSWER.index(GEN)
    assert sequence.codes["a"][drawing + 1 : drawing + 3].tolist() == [[2], [3]]  # where it is only history, too


def test_what_may_be_left_out():
    text = to_sequence(conversation(), SPECIAL, Reading((False, False), drop_text=True)).tokens.tolist()
    assert text[: len(FIRST) - 2] == [*USER, START, IMG, END, STOP, *NEWLINE, *ASSISTANT]
    image = to_sequence(conversation(), SPECIAL, Reading((False, False), drop_image=True))
    assert image.tokens[: len(FIRST) - 3].tolist() == [*USER, 20, 21, STOP, *NEWLINE, *ASSISTANT]
    assert image.codes["a"].sum() == 2 + 3  # the drawing keeps its own


def test_a_page_of_one_image_is_no_pair():
    codes = {"a": np.array([[1]], dtype=np.uint16)}
    page = Document("k", np.array([30, IMG, 31], dtype=np.uint32), codes, np.array([[1, 1]], dtype=np.uint16))
    for draw, (start, end) in {True: (GEN, GEN_END), False: (START, END)}.items():
        read = to_sequence(page.check(SPECIAL), SPECIAL, Reading((draw,), drop_text=True))
        assert read.tokens.tolist() == [30, start, IMG, end, 31, EOS]


@pytest.mark.parametrize("change, message", [
    ({"turns": [[3, 2, 0], [7, 3, 1]]}, "turns end at .3, 7., the text has 8 ids"),
    ({"turns": [[5, 2, 0], [3, 3, 1], [8, 2, 0]]}, "turns end at"),
    ({"turns": [[8, 9, 0]]}, "unknown role 9"),
    ({"turns": [[8, Role.CAPTION, 1]]}, "a pair is one image"),
    ({"image_use": [1]}, "uses of 1 images, there are 2"),
])  # fmt: skip
def test_turns_that_do_not_fit_are_named(change, message):
    document = conversation()
    for name, value in change.items():
        setattr(document, name, np.array(value, dtype=getattr(document, name).dtype))
    with pytest.raises(ValueError, match=f"document 'c'.*{message}"):
        document.check(SPECIAL)


@pytest.mark.parametrize("document", random_documents(20, images=(0, 3)), ids=lambda d: d.key)
@pytest.mark.parametrize("draw", [False, True])
def test_length_is_known_before_building(document, draw):
    reading = Reading((draw,) * len(document.grids))
    assert len(to_sequence(document, SPECIAL, reading)) == document.lengths(SPECIAL).sequence_length()


def test_row_round_trip():
    for document in random_documents(10, images=(0, 2)):
        again = Document.from_row(document.row())
        assert list(document.row()) == list(mds_columns(document.codes))
        assert again.codes.keys() == document.codes.keys()
        for stream, codes in document.codes.items():
            assert np.array_equal(again.codes[stream], codes)
        for name in ("key", "text_ids", "turns", "grids", "image_use", "meta"):
            assert np.array_equal(getattr(again, name), getattr(document, name)), name


def test_document_that_does_not_fit_is_named():
    document = pair()
    document.codes["b"] = document.codes["b"][:1]
    with pytest.raises(ValueError, match="document 'k': b codes of shape"):
        document.check(SPECIAL)
    with pytest.raises(ValueError, match="2 image tokens in the text, 1 grids"):
        Document("k", np.array([IMG, IMG]), {}, pair().grids).check(SPECIAL)


@pytest.mark.parametrize("names, message", [
    (["a", "meta"], "'meta'.*another meaning"),  # a column
    (["text"], "'text'.*another meaning"),  # a loss
    (["train"], "'train'.*another meaning"),  # a method of the module that holds the heads
    (["a b"], "'a b'.*letters"),
    (["a", "a"], "'a' is there 2 times"),
])  # fmt: skip
def test_names_that_streams_cant_have(names, message):
    check_stream_names(["semantic", "pixel", "fine_2"])
    with pytest.raises(ValueError, match=message):
        check_stream_names(names)


def test_a_codebook_must_fit_the_shards():
    Stream("a", 4, 65_536, 8)
    with pytest.raises(ValueError, match="'a': a codebook of 65,537"):
        Stream("a", 4, 65_537, 8)
