"""Priors on disk: what is written comes back, and whatever is not a prior is refused in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffinv.core.checks import InputError
from diffinv.core.rng import Rng
from diffinv.priors import store
from diffinv.priors.precondition import Preconditioned
from diffinv.priors.store import PriorCard, build_denoiser, load_prior, save_prior

CARD = PriorCard(
    name="tiny",
    bands=("g", "r"),
    size=16,
    pixel_scale=0.1,
    target_fwhm=0.2,
    sigma_data=0.8,
    sigma_min=0.002,
    sigma_max=80.0,
    widths=(8, 16),
    blocks=(1, 1),
    training="none: random weights of a test",
)


def random_denoiser(card: PriorCard = CARD) -> Preconditioned:
    denoiser = build_denoiser(card)
    for number, parameter in enumerate(denoiser.parameters()):
        parameter.data.copy_(0.1 * Rng([number]).normal(torch.zeros(1, *parameter.shape))[0])
    return denoiser.requires_grad_(False)


def variance() -> Tensor:
    return 0.1 + torch.arange(2 * 16 * 16.0).reshape(1, 2, 16, 16) / 100


def saved(folder: Path, precision: torch.dtype = torch.float32) -> tuple[Path, Preconditioned]:
    path, denoiser = folder / "priors" / "tiny.safetensors", random_denoiser()
    save_prior(path, denoiser, CARD, variance=variance(), precision=precision)
    return path, denoiser


def images() -> tuple[Tensor, Tensor]:
    return Rng.for_draws(0, range(3), 1).normal(torch.zeros(3, 2, 16, 16)), torch.tensor([0.01, 1.0, 30.0])


def test_a_prior_comes_back_exactly_in_float32(tmp_path: Path) -> None:
    path, denoiser = saved(tmp_path)
    prior = load_prior(path)
    assert prior.card == CARD
    assert torch.equal(prior.variance, variance())
    torch.testing.assert_close(prior(*images()), denoiser(*images()), rtol=0, atol=0)
    assert not prior.training
    assert not any(p.requires_grad for p in prior.parameters())


def test_a_prior_comes_back_to_the_stored_precision(tmp_path: Path) -> None:
    path, denoiser = saved(tmp_path, torch.float16)
    prior = load_prior(path)
    pairs = list(zip(prior.denoiser.state_dict().values(), denoiser.state_dict().values(), strict=True))
    assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        assert bool(((ours - theirs).abs() <= 2**-11 * theirs.abs() + 2**-25).all())  # half a unit in the last place
    assert torch.equal(prior.variance, variance())
    assert 2 * path.stat().st_size < 1.3 * saved(tmp_path)[0].stat().st_size


def test_low_precision_arithmetic_keeps_the_interface_in_float32(tmp_path: Path) -> None:
    path, denoiser = saved(tmp_path)
    x, sigma = images()
    low = load_prior(path, dtype=torch.bfloat16)(x, sigma)
    assert low.dtype == torch.float32
    difference = (low - denoiser(x, sigma)).abs().flatten(1).amax(1)
    assert 0 < float(difference.max()) < 0.1


def test_the_digest_is_that_of_the_file_and_changes_with_a_weight(tmp_path: Path) -> None:
    path, denoiser = saved(tmp_path)
    first = load_prior(path).digest
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    next(denoiser.parameters()).data.view(-1)[0] += 1
    save_prior(path, denoiser, CARD, variance=variance())
    assert load_prior(path).digest != first


def test_a_shipped_prior_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = saved(tmp_path)
    monkeypatch.setattr(store, "SHIPPED", path.parent)
    assert load_prior("tiny").card == CARD
    with pytest.raises(InputError, match="prior 'tyni': no such file; shipped priors: tiny;"):
        load_prior("tyni")


def _rewrite(path: Path, card: object, change: Callable[[dict[str, Tensor]], object] | None = None) -> None:
    state = load_file(path)
    if change is not None:
        change(state)
    save_file(state, path, metadata=None if card is None else {"card": card if isinstance(card, str) else json.dumps(card)})


def _card(**changes: object) -> dict[str, object]:
    return {**asdict(CARD), **changes}


def _without(key: str) -> dict[str, object]:
    return {name: value for name, value in asdict(CARD).items() if name != key}


def _shorten(state: dict[str, Tensor]) -> None:
    state["stem.weight"] = state["stem.weight"][:4].contiguous()


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-50]), "not a readable safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "not a readable safetensors file"),
    "a web page": (lambda p: p.write_text("<html>not found</html>"), "not a readable safetensors file"),
    "a pickle under the name of safetensors": (lambda p: torch.save({"w": torch.ones(3)}, p), "not a readable safetensors file"),
    "no metadata": (lambda p: _rewrite(p, None), "has no prior card"),
    "card is no JSON": (lambda p: _rewrite(p, "{"), "its prior card cannot be read"),
    "card is a list": (lambda p: _rewrite(p, "[1]"), "its prior card cannot be read"),
    "card lacks a key": (lambda p: _rewrite(p, _without("sigma_max")), "its prior card cannot be read"),
    "card has an unknown key": (lambda p: _rewrite(p, _card(colour=1)), "its prior card cannot be read"),
    "another architecture": (lambda p: _rewrite(p, _card(widths=[16, 16])), "do not fit the architecture"),
    "an impossible architecture": (lambda p: _rewrite(p, _card(widths=[7, 16])), "do not fit the architecture"),
    "widths and blocks differ": (lambda p: _rewrite(p, _card(blocks=[1])), "do not fit the architecture"),
    "a weight of another shape": (lambda p: _rewrite(p, _card(), _shorten), "do not fit the architecture"),
    "a weight is missing": (lambda p: _rewrite(p, _card(), lambda s: s.pop("stem.bias")), "do not fit the architecture"),
    "no variance map": (lambda p: _rewrite(p, _card(), lambda s: s.pop("card.variance")), "no variance map"),
    "variance map of another size": (lambda p: _rewrite(p, _card(size=32)), r"no variance map"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_one_line_that_names_the_file(tmp_path: Path, defect: str) -> None:
    path, _ = saved(tmp_path)
    spoil, reason = DEFECTS[defect]
    spoil(path)
    with pytest.raises(InputError) as error:
        load_prior(path)
    text = str(error.value)
    assert reason in text and str(path) in text and "\n" not in text


def test_pickled_weights_are_refused_without_being_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, ("raise AssertionError('a pickle was read')",)

    path = tmp_path / "weights.pt"
    torch.save(Bomb(), path)
    with pytest.raises(InputError, match=r"must be a \.safetensors file") as error:
        load_prior(path)
    assert "\n" not in str(error.value)


def test_a_rewritten_file_without_a_defect_still_loads(tmp_path: Path) -> None:
    path, denoiser = saved(tmp_path)
    _rewrite(path, asdict(replace(CARD, training="again")))
    prior = load_prior(path)
    assert prior.card.training == "again"
    assert torch.equal(prior(*images()), denoiser(*images()))
