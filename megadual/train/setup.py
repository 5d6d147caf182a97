"""From a run's config to what it trains on and with, checked before any process group exists."""

import dataclasses

from megadual.config import PretrainConfig
from megadual.data.mds_reader import ShardSet
from megadual.model.dual_lm import Vocabulary
from megadual.streams import STREAMS, SpecialIds
from megadual.text import fingerprint, load_text_tokenizer
from megadual.vision import read_codebooks


@dataclasses.dataclass
class Inputs:
    """What a run reads: the shard sets, and what its tokenizers give the model."""

    sets: list[ShardSet]
    special: SpecialIds
    vocabulary: Vocabulary


def read_inputs(run: PretrainConfig) -> Inputs:
    """Open the run's tokenizers and shard sets; UserError where one is missing or they don't belong together."""
    tokenizer = load_text_tokenizer(run.model.text_tokenizer)
    codebooks = read_codebooks(run.model.dualtoken)
    sets = [ShardSet(root) for root in run.data.sets]
    for shard_set in sets:
        shard_set.check(
            codebooks["fingerprint"], run.model.dualtoken, fingerprint(tokenizer), run.model.text_tokenizer
        )
    vocabulary = Vocabulary(
        text_size=len(tokenizer),
        depth=codebooks["depth"],
        codebooks={stream: codebooks[stream] for stream in STREAMS},
    )
    return Inputs(sets, SpecialIds.of(tokenizer), vocabulary)
