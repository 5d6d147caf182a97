"""Engines: what runs the model over processes. Notices of megatron-core that say nothing to a user are hidden."""

import logging
import warnings

for _notice in (
    "Transformer Engine and Apex are not installed",  # not needed: attention and norm are ours
    "Apex is not installed",
    "full scope is deprecated",  # its own default
    "The .grad attribute of a Tensor that is not a leaf",  # its optimizer looks at views of parameters
    "`torch.distributed.",  # its use of collectives that newer torch renames
):
    warnings.filterwarnings("ignore", message=_notice)
# Of a layout of parameters that it could be given, and makes itself.
logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
