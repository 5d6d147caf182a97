"""Host memory that checkpoints' tensors are cut from."""

import io

import torch

from megadual.engine.staging import Staging, size_of


def test_cuts_tensors_that_are_saved_alone():
    given = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.empty(0, 4), torch.arange(9)]
    staging = Staging(sum(size_of(each.shape, each.dtype) for each in given))
    for _ in range(2):
        staging.reset()
        cut = [staging.copy(each) for each in given]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(cut, given, strict=True))
        for each in cut:
            saved = io.BytesIO()
            torch.save(each, saved)
            assert saved.tell() < each.nbytes + 2048  # not what its memory was cut from
            assert torch.equal(torch.load(io.BytesIO(saved.getvalue()), weights_only=True), each)
    held = cut[0]
    staging.reset()
    staging.copy(given[0] + 1)
    assert torch.equal(held, given[0] + 1)  # the memory is the same
    staging.close()
