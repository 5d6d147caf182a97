"""A library's private part that is gone is told by its name, before any work."""

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megadual.engine import megatron_internals
from megadual.errors import UserError


def test_what_this_version_lacks_is_named(monkeypatch):
    megatron_internals.check()
    monkeypatch.delattr(filesystem_async.FileSystemWriterAsync, "write_preloaded_data")
    with pytest.raises(UserError, match=r"megatron-core 0.\d+.\d+ has no FileSystemWriterAsync.write_preloaded_data: "):
        megatron_internals.check()
