"""Muon against a plain one in numpy: one matrix, and the parameters of a model after two steps."""

import numpy as np
import pytest
import torch

from megadual.engine.megatron_internals import adamw
from megadual.engine.muon import RMS, orthogonalized
from megadual.model.init import global_name
from megadual.testing import tiny
from megadual.testing.distributed import run_distributed


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def random_matrices(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 32, 32), (1, 1, 8)])
def test_a_batch_is_orthogonalised_matrix_by_matrix(shape):
    given = random_matrices(*shape)
    got = orthogonalized(torch.tensor(given).float()).numpy() / (RMS * np.sqrt(shape[2]))
    for x, update in zip(given, got, strict=True):
        np.testing.assert_allclose(update, newton_schulz(x), atol=2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_singular_values_are_about_one_and_directions_stay(dtype, tolerance):
    """By the SVD: update = U f(S) V' with f(S) about 1, of a matrix of which no direction is negligible."""
    given = random_matrices(24, 64) * 1e-6
    u, _, v = np.linalg.svd(given, full_matrices=False)
    got = orthogonalized(torch.tensor(given).to(dtype)[None])[0].double().numpy() / (RMS * 8)
    inside = u.T @ got @ v.T
    assert 0.6 < np.diag(inside).min() and np.diag(inside).max() < 1.3
    assert np.abs(inside - np.diag(np.diag(inside))).max() < tolerance
    assert np.sqrt((got**2).mean()) * RMS * 8 == pytest.approx(RMS, rel=0.2)  # what AdamW's rates are made for


def test_no_gradient_no_update():
    assert orthogonalized(torch.zeros(1, 4, 8)).equal(torch.zeros(1, 4, 8))


def two_steps_of(runs):
    """Of each run: its parameters before and after each of two steps, and the clipped gradients of both, by name."""
    return [two_steps(run) for run in runs]


def two_steps(run):
    engine, data = tiny.build(run)
    (chunk,), optimizer, gradients = engine.chunks, adamw(engine.optimizer), []
    named = {global_name(name, chunk): parameter for name, parameter in chunk.named_parameters()}
    step = optimizer.step

    def observed():
        gradients.append({name: parameter.main_grad.clone().numpy() for name, parameter in named.items()})
        return step()

    optimizer.step = observed
    weights = []
    for s in range(2):
        weights.append({name: parameter.detach().clone().numpy() for name, parameter in named.items()})
        engine.train_step(data.step(s))
    weights.append({name: parameter.detach().clone().numpy() for name, parameter in named.items()})
    engine.shutdown()
    return weights, gradients


# Of the tiny model, 4 heads of 16 on 2 KV heads: rows of each part, as megatron-core keeps q, k and v.
QKV = [[*range(0, 32), *range(64, 96)], [*range(32, 48), *range(96, 112)], [*range(48, 64), *range(112, 128)]]
PARTS = {
    "linear_qkv": QKV, "linear_fc1": [range(128), range(128, 256)], ".qkv": [range(32), range(32, 64), range(64, 96)],
    ".gate_up": [range(64), range(64, 128)],
}  # fmt: skip
BY_ADAMW = ("word_embeddings.weight", "output_layer.weight", "classifiers", "depth_embedding", "norm", ".bias")


def test_which_parameters_and_by_how_much(tmp_path):
    shards = tiny.write_tiny_set(tmp_path / "set")
    settings = ["train.schedule=constant", "train.weight_decay=0.5", "train.clip_grad=0.5"]
    runs = [tiny.tiny_run(tmp_path, shards, *settings, f"train.optimizer={each}") for each in ("muon", "adamw")]
    (((weights, gradients), (plain, _)),) = run_distributed(two_steps_of, 1, runs)
    lr, decay, momentum, trained = 1e-3, 0.5, 0.95, 0
    for name, before in weights[0].items():
        if any(part in name for part in BY_ADAMW):
            assert np.array_equal(weights[1][name], plain[1][name]), name
            continue
        parts = next((rows for part, rows in PARTS.items() if f"{part}.weight" in name), [range(len(before))])
        assert sum(map(len, parts)) == len(before), name
        buffer, expected = 0, before.astype(float)
        for step in range(2):
            gradient = gradients[step][name].astype(float)
            buffer = momentum * buffer + gradient
            update = np.zeros_like(expected)
            for rows in map(list, parts):
                taken = (gradient + momentum * buffer)[rows]
                update[rows] = newton_schulz(taken) * 0.2 * np.sqrt(max(taken.shape))
            expected = expected * (1 - lr * decay) - lr * update
            np.testing.assert_allclose(weights[step + 1][name], expected, atol=2e-7, err_msg=name)
        assert not np.allclose(weights[1][name], before, atol=1e-5)
        trained += 1
    assert trained == 4 * 4 + 2 + 2 * (2 + 1 + 2 * 4)
