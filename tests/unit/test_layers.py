"""What the transformer's config says to megatron-core."""

from megadual.model.layers import transformer_config
from megadual.testing import tiny


def test_chunks_of_a_virtual_pipeline_never_send_in_batches():
    """Batched sends of two chunks between the same two ranks would be swapped, which no error tells."""
    run = tiny.tiny_run(
        "unused", "unused", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.stage_layers=[1,1,1,1]"
    )
    config = transformer_config(run)
    assert config.overlap_p2p_comm and not config.batch_p2p_comm
