"""Interpolatory autoencoders and emulators of spectral models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from diffinv.core.checks import DiffinvError, InputError
from diffinv.core.rng import Rng
from diffinv.spectral.base import Parameter
from diffinv.spectral.combine import UserModel
from diffinv.unmixing.barycentre import (
    InterpolatoryAutoencoder,
    LeakyLayers,
    TrainingPlan,
    barycentric_weights,
    batches,
    farthest_points,
    initialise,
    train_autoencoder,
)
from diffinv.unmixing.boxed import Boxed
from diffinv.unmixing.emulator import (
    EmulatorDesign,
    EmulatorPlan,
    chi2_a_count,
    emulator_errors,
    rank_of,
    train_emulator,
)
from diffinv.unmixing.emulator_store import load_emulator, save_emulator
from tests.unit.test_unmixing_fit import GRID, LINE, line

F64 = torch.float64
MODEL = Boxed(LINE, (("T", 0.5, 3.0), ("centre", 2.2, 2.8)))
PLAN = EmulatorPlan(examples=1024, design=EmulatorDesign(width=128))


@pytest.fixture(scope="module")
def emulator():
    return train_emulator(MODEL, ("T",), PLAN)


def test_barycentric_weights_minimise_the_distance_under_their_sum() -> None:
    rng = Rng([0])
    anchors, latent = (rng.normal(torch.empty(1, n, 6, dtype=F64))[0] for n in (4, 10))
    weights = barycentric_weights(latent, anchors, 1e-9)
    torch.testing.assert_close(weights.sum(1), torch.ones(10, dtype=F64))
    gradient = (weights @ anchors - latent) @ anchors.mT  # must be a multiple of 1: the multiplier
    assert float((gradient - gradient.mean(1, keepdim=True)).abs().max()) < 1e-7
    own = barycentric_weights(anchors, anchors, 1e-9)
    torch.testing.assert_close(own, torch.eye(4, dtype=F64), rtol=0, atol=1e-6)


def test_farthest_points_are_the_corners_of_a_square() -> None:
    x = torch.cartesian_prod(torch.linspace(0, 1, 5), torch.linspace(0, 1, 5))
    assert sorted(farthest_points(x, 4).tolist()) == [0, 4, 20, 24]


def test_layers_are_the_published_ones() -> None:
    layers, h = LeakyLayers(3, 2, 0.3).double(), Rng([1]).normal(torch.empty(1, 5, 3, dtype=F64))[0]
    initialise(layers, 0, bias=0.5)
    expected = h
    for linear in layers.linear:
        expected = functional.leaky_relu(expected @ linear.weight.mT + linear.bias, 0.1) + 0.3 * expected
    torch.testing.assert_close(layers(h), expected)


def test_batches_pass_over_all_rows_and_depend_on_the_seed_alone() -> None:
    plan = TrainingPlan(steps=6, batch=4, rate=1.0)
    found = batches(12, plan)
    assert sorted(torch.cat(found[:3]).tolist()) == list(range(12)) and len(found) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, batches(12, plan), strict=True))
    assert torch.cat(found[:3]).tolist() != torch.cat(found[3:]).tolist()


def test_training_the_published_autoencoder_lowers_its_loss_and_keeps_the_weights_a_partition() -> None:
    u = torch.linspace(0.3, 3.0, 200, dtype=F64)
    x = line(torch.stack([u, 2 + 0.3 * torch.sin(2 * u)], 1))
    network = InterpolatoryAutoencoder(x[farthest_points(x, 3)]).double()
    initialise(network, 0)
    with torch.no_grad():
        before = float(network.loss(x, 0.1))
    after = train_autoencoder(network, x, TrainingPlan(200, 64, 2e-3))
    with torch.no_grad():
        weights = network.weights(x)
        error = float((network.decode(weights) - x).pow(2).sum(1).mean() / x.pow(2).sum(1).mean())
    torch.testing.assert_close(weights.sum(1), torch.ones(200, dtype=F64))
    assert error <= after * (1 + 1e-9) < 0.05 * before


def test_an_emulator_is_within_its_budget_and_its_head_inverts_it(emulator) -> None:
    found = emulator_errors(emulator, MODEL, count=256, seed=5)
    assert found.chi2[1] < 5e-5
    assert found.head["T"][0] < 5e-3 and found.head["centre"][0] < 1e-3 * 2


def test_spectra_are_normalised_and_their_derivatives_those_of_the_model(emulator) -> None:
    u = 0.1 + 0.8 * Rng([2]).uniform(torch.empty(1, 20, 2, dtype=F64))[0]
    theta = emulator.coordinates.physical(u)
    torch.testing.assert_close(emulator(theta).sum(1), torch.ones(20, dtype=F64))
    for k in range(2):
        kick = torch.zeros(2, dtype=F64)
        kick[k] = 1.0
        slopes = [torch.func.jvp(m, (theta,), (kick.expand_as(theta),))[1] for m in (emulator, LINE)]
        size = slopes[1].pow(2).sum(1).sqrt()
        assert float(((slopes[0] - slopes[1]).pow(2).sum(1).sqrt() / size).max()) < 0.05


def test_an_emulator_on_disk_is_the_same_and_the_seed_decides_it(emulator, tmp_path: Path) -> None:
    path = tmp_path / "line.safetensors"
    save_emulator(path, emulator, "a test")
    theta = emulator.coordinates.physical(torch.tensor([[0.2, 0.7], [0.9, 0.1]], dtype=F64))
    assert torch.equal(load_emulator(path)(theta), emulator(theta))
    again = train_emulator(MODEL, ("T",), PLAN)
    assert torch.equal(again(theta), emulator(theta))


def test_files_that_hold_no_emulator_are_named(emulator, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_emulator(tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"garbage")
    with pytest.raises(InputError, match="not a readable"):
        load_emulator(broken)


def test_rank_is_the_smallest_that_keeps_chi2() -> None:
    """Spectra of exactly two log-linear degrees of freedom have rank 2."""
    a = Rng([4]).normal(torch.empty(1, 300, 2, dtype=F64))[0]
    log = 0.05 * (a[:, :1] * GRID.middle + a[:, 1:] * GRID.middle**2)
    spectra = torch.softmax(log, 1)
    centre, scale = spectra.log().mean(0), torch.ones(len(GRID), dtype=F64)
    values = (spectra.log() - centre) / scale
    basis = torch.linalg.eigh(values.mT @ values)[1].flip(1)
    assert rank_of(spectra, centre, scale, basis, 1e-12) in (2, 3)  # the normalisation adds a constant
    assert rank_of(spectra, centre, scale, basis, 1.0) == 1


def test_chi2_a_count_is_what_one_count_would_tell() -> None:
    truth = torch.tensor([[0.25, 0.75]], dtype=F64)
    assert float(chi2_a_count(torch.tensor([[0.3, 0.7]], dtype=F64), truth)) == pytest.approx(0.05**2 / 0.25 + 0.05**2 / 0.75)


def test_a_box_of_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(DiffinvError, match="no parameter speed"):
        Boxed(LINE, (("speed", 0.0, 1.0),))


def test_a_model_that_is_not_positive_is_refused() -> None:
    model = UserModel(GRID, (Parameter("a", "", 0.0, 1.0),), lambda t: (GRID.middle - 2.5) * (1 + t))
    with pytest.raises(DiffinvError, match="not positive"):
        train_emulator(model, ())
