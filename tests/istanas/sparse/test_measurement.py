"""Measurement matrices; edge weights compared with their formula, finite differences and the golden file."""

import numpy as np
import pytest
import torch

from istanas.errors import ConfigError
from istanas.sparse import (
    edge_weights,
    gram_bias,
    initial_compressed_alphas,
    measurement_matrix,
    recover,
    top_support,
)


@pytest.mark.parametrize("shape", [(7, 14), (14, 14), (40, 21)])
def test_uniform_entries_fill_the_unit_interval(shape):
    A = measurement_matrix("uniform", *shape, 0)
    assert A.shape == shape
    assert A.dtype == torch.float64
    assert A.min() >= 0.0
    assert A.max() < 1.0
    assert abs(float(A.mean()) - 0.5) < 0.1


def test_gaussian_columns_have_unit_length():
    A = measurement_matrix("gaussian", 7, 35, 0)
    torch.testing.assert_close(A.norm(dim=0), torch.ones(35, dtype=torch.float64))
    assert A.min() < 0.0 < A.max()


def test_a_seed_is_a_matrix_and_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    first, second, other = (measurement_matrix("uniform", 7, 14, seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    # A must be the same on every machine and in every release.
    assert first[0, :3].tolist() == pytest.approx([0.9700530018, 0.7078198644, 0.4593829431], abs=1e-9)


def test_a_generator_goes_on():
    generator = torch.Generator().manual_seed(0)
    first, second = (measurement_matrix("gaussian", 7, 14, generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, measurement_matrix("gaussian", 7, 14, 0))


def test_initial_alphas_have_their_scale():
    b = initial_compressed_alphas(10_000, 0)
    assert b.shape == (10_000,)
    assert float(b.std()) == pytest.approx(1e-3, rel=0.05)
    assert torch.equal(initial_compressed_alphas(7, 3, scale=2.0), 2e3 * initial_compressed_alphas(7, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measurement_matrix("fourier", 7, 14, 0), "kind: unknown matrix 'fourier'; choose from"),
        (lambda: measurement_matrix("uniform", 0, 14, 0), "n_measurements: 0 is too small"),
        (lambda: measurement_matrix("uniform", 7, 0, 0), "n_candidates: 0 is too small"),
        (lambda: measurement_matrix("uniform", 7, 14, -1), "seed: -1 is negative"),
        (lambda: initial_compressed_alphas(0, 0), "n_measurements: 0 is too small"),
        (lambda: initial_compressed_alphas(7, 0, scale=0.0), r"scale: 0\.0 is not positive"),
        (
            lambda: edge_weights(np.eye(2), np.ones(2), np.ones(2), 1, support=[0]),
            "sparsity: 1 is given together with support",
        ),
        (lambda: edge_weights(np.eye(2), np.ones(2), np.ones(2), 3), "sparsity: 3 cannot be chosen"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def node(seed=0):
    rng = np.random.default_rng(seed)
    A, b = rng.random((7, 21)), 0.1 * rng.standard_normal(7)
    return A, b, recover(A, b).z


def test_gram_bias_is_its_formula():
    A, _, z = node()
    np.testing.assert_allclose(gram_bias(A, z), (A.T @ A - np.eye(21)) @ z, atol=1e-13)
    np.testing.assert_allclose(
        gram_bias(torch.tensor(A), torch.tensor(z)).numpy(), gram_bias(A, z), atol=1e-14
    )


def test_edge_weights_are_their_formula_on_the_support():
    A, b, z = node()
    S = top_support(z, 2)
    z_S = np.zeros(21)
    z_S[S] = z[S]
    expected = np.zeros(21)
    expected[S] = (A.T @ b - (A.T @ A - np.eye(21)) @ z_S)[S]
    assert np.all(expected[S] != 0)
    for alpha in (edge_weights(A, b, z, 2), edge_weights(A, b, z, support=S), edge_weights(A, b, z_S)):
        np.testing.assert_allclose(alpha, expected, atol=1e-14)
    groups = np.repeat([0, 1, 2], 7)
    grouped = edge_weights(A, b, z, 3, groups=groups)
    assert np.flatnonzero(grouped).tolist() == top_support(z, 3, groups=groups).tolist()


def test_at_the_minimiser_whole_weights_are_the_code_and_l1():
    A, b, z = node(1)
    np.testing.assert_allclose(edge_weights(A, b, z), z + 1e-5 * np.sign(z), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edge_weights_keep_kind_and_dtype(dtype):
    A, b, z = node()
    alpha = edge_weights(torch.tensor(A), torch.tensor(b, dtype=dtype), torch.tensor(z), 2)
    assert alpha.dtype == dtype
    np.testing.assert_allclose(alpha.double().numpy(), edge_weights(A, b, z, 2), atol=1e-6)
    mixed = edge_weights(A, torch.tensor(b, dtype=dtype), z, 2)
    assert torch.equal(mixed, alpha)
    array = edge_weights(torch.tensor(A), alpha.new_tensor(b).numpy(), z, 2)
    assert isinstance(array, np.ndarray)
    assert array.dtype == alpha.numpy().dtype
    assert edge_weights(A.tolist(), b.tolist(), z.tolist(), 2).dtype == np.float64


def test_gradient_in_b_by_finite_differences():
    A, b, z = node(2)
    parameter = torch.tensor(b, requires_grad=True)
    weights = torch.linspace(-1.0, 2.0, 21, dtype=torch.float64)

    def loss(values):
        return (torch.sin(edge_weights(A, values, z, 3)) * weights).sum()

    (gradient,) = torch.autograd.grad(loss(parameter), parameter)
    step = 1e-6
    for i in range(7):
        delta = torch.zeros(7, dtype=torch.float64)
        delta[i] = step
        numeric = (loss(parameter.detach() + delta) - loss(parameter.detach() - delta)) / (2 * step)
        assert float(gradient[i]) == pytest.approx(float(numeric), rel=1e-6)
    assert gradient.abs().min() > 0


def test_the_code_is_a_constant():
    A, b, z = node()
    code = torch.tensor(z, requires_grad=True)
    alpha = edge_weights(A, torch.tensor(b, requires_grad=True), code, 2)
    alpha.sum().backward()
    assert code.grad is None


@pytest.mark.parametrize("cell", ["normal", "reduce"])
def test_golden_edge_weights(golden_dir, cell):
    data = np.load(golden_dir / "supernet_twostage.npz")
    rows = []
    for i in range(4):
        alpha = edge_weights(
            data[f"A_{cell}/{i}"], data[f"b_{cell}"][i].astype(np.float64), data[f"z_{cell}/{i}"], 2
        )
        rows.append(alpha.reshape(-1, 7))
    ours, theirs = np.concatenate(rows), data[f"alpha_{cell}"].astype(np.float64)
    assert np.linalg.norm(ours - theirs) <= 1e-9 * np.linalg.norm(theirs)
    assert np.count_nonzero(theirs) == 8
