"""A plan's stand-ins for inputs that are not here: each is told."""

from collections.abc import Iterator
from pathlib import Path

from megadual.engine.stages import Traffic
from megadual.errors import UserError
from megadual.model.dual_lm import Vocabulary
from megadual.streams import Stream
from megadual.text import load_text_tokenizer
from megadual.train import setup
from megadual.train.config import NOT_GIVEN, PretrainConfig
from megadual.vision import read_codebooks
from megadual.vision.presets import PRESETS, preset

TEXT_SIZE = 151_936  # Qwen2.5's
DUALTOKEN = "siglip2-so400m-256-rvq4"
CAPTION = 600  # tokens
FILL = 0.95


def read_or_assume(run: PretrainConfig) -> setup.Inputs:
    """The run's inputs as `setup.read_inputs` reads them, or where some are missing what can be assumed of them.

    UserError still for inputs that are here and don't belong together.
    """
    tokenizer = _tokenizer(run)
    missing = list(_missing(run)) + ([] if tokenizer else [f"model.text_tokenizer '{run.model.text_tokenizer}'"])
    if not missing:
        return setup.read_inputs(run)
    assumed = [f"not here: {', '.join(missing)}"]
    if not tokenizer:
        assumed.append(f"a text tokenizer of {TEXT_SIZE:,} ids")
    text_size = len(tokenizer) if tokenizer else TEXT_SIZE
    streams, positions = _streams(run, assumed)
    streams = setup.choose_streams(streams, run.model.streams)
    setup.check_losses(run, [stream.name for stream in streams])
    inputs = setup.Inputs([], None, Vocabulary(text_size, streams, {}), assumed=assumed)
    inputs.traffic = traffic(run, positions)
    assumed.append(
        f"documents of a caption of {CAPTION} tokens and an image of {positions} positions, of which "
        f"{inputs.traffic.drawn / inputs.traffic.image:.0%} are drawn; rows filled to {FILL:.0%}"
    )
    return inputs


def traffic(run: PretrainConfig, positions: int) -> Traffic:
    """Of pairs whose images have so many positions, drawn as often as the run's sets draw them."""
    length = min(CAPTION + positions, run.train.seq_len)
    image = positions / (CAPTION + positions)
    draw = sum(each.draw for each in run.data.sets) / len(run.data.sets)
    return Traffic(text=1 - image, drawn=draw * image, image=image, attended=length, fill=FILL)


def _missing(run: PretrainConfig) -> Iterator[str]:
    """Which shard sets are not here, and whether the DualToken is."""
    for path in dict.fromkeys(each.path for each in run.data.sets + run.data.validation):
        if not Path(path).is_dir():
            yield f"shard set '{path}'"
    if not Path(run.model.dualtoken).is_dir():
        yield f"model.dualtoken '{run.model.dualtoken}'"


def _tokenizer(run: PretrainConfig):
    if run.model.text_tokenizer == NOT_GIVEN:  # which may not be asked of the hub
        return None
    try:
        return load_text_tokenizer(run.model.text_tokenizer)
    except UserError:
        return None


def _streams(run: PretrainConfig, assumed: list[str]) -> tuple[list[Stream], int]:
    """The DualToken's streams, and the positions of its images."""
    path = run.model.dualtoken
    if Path(path).is_dir():
        try:
            books = read_codebooks(path)
        except ValueError as error:
            raise UserError(f"model.dualtoken: {error}") from error
        return books.streams, books.grid[0] * books.grid[1]
    name = path if path in PRESETS else DUALTOKEN
    others = ", ".join(each for each in PRESETS if each != name)
    assumed.append(f"the DualToken {name} (model.dualtoken may name another: {others})")
    config = preset(name)
    return config.code_streams, config.grid[0] * config.grid[1]
