"""Which images can the data speak of at all? The spectrum of the mean information, before any training.

    M = s² E_k[T_kᵀ A_iᵀ P A_i T_k]

over the rows i of a batch (several operators), the transforms T_k of a group, or both; P = 1/σ² is the precision of the
data and s the spread of the images, so that the eigenvalues of M are squared signal-to-noise ratios of single
measurements. A direction is seen where its eigenvalue exceeds 1. Counting against the noise matters: interpolation spills
a little of everything into the null space, and in exact arithmetic almost every M has full rank.

The answer does not depend on the type of an operator. A group that leaves AᵀPA as it is adds nothing, whatever it is
called: shifts on the torus to a periodic convolution, quarter turns to a round PSF. It is necessary for learning, not
sufficient: the images must also be few among those that M sees (Tachella, Chen & Davies, *Sensing Theorems for
Unsupervised Learning in Linear Inverse Problems*, 2023, arXiv:2203.12513).
Invariant: M is the mean over one fixed set of draws, the same for the spectrum, the map and every probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.linalg import dense
from diffinv.core.rng import Rng
from diffinv.core.types import LinearMap, Shape
from diffinv.likelihood import Likelihood
from diffinv.operators.algebra import Compose
from diffinv.operators.base import LinearOperator, Operator
from diffinv.operators.groups import Group

COMMUTES = 1e-6  # relative change of the information by a group below which the two commute: the rounding of float32 fields


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A distribution of eigenvalues over image space.

    Arguments: values: (m,), squared signal-to-noise ratios, decreasing. weights: (m,), share of image space of each, Σ = 1.
    """

    values: Tensor
    weights: Tensor

    @property
    def seen(self) -> float:
        """Share of image space with an eigenvalue above 1."""
        return float(self.weights[self.values > 1].sum())


@dataclass(frozen=True, eq=False)
class Identifiability:
    """What the measurements, transformed or together, can say of the images. `str` is the line to print.

    Arguments:
        spectrum: of M. alone: of the operator without the group (of the rows one by one where there is no group).
        map: (C, H, W), between 0 and 1: share of each pixel that no measurement sees, the diagonal of the projector on
            the unseen directions. moved: ‖M − M_alone‖/‖M_alone‖, 0 where the group commutes with the information.
        error: standard error of `seen` and `without`, 0 where the spectrum is exact for the elements drawn.
        group: its name, or None. elements: number of measurements in the mean.
    """

    spectrum: Spectrum
    alone: Spectrum
    map: Tensor
    moved: float
    error: float
    group: str | None
    elements: int

    @property
    def seen(self) -> float:
        """Share of image space that is seen above the noise."""
        return self.spectrum.seen

    @property
    def without(self) -> float:
        """The same without the group, or for one row alone."""
        return self.alone.seen

    def __str__(self) -> str:
        error = f" ± {100 * self.error:.1f}" if self.error else ""
        text = f"identifiability: {100 * self.seen:.1f}{error} % of image space is seen above the noise"
        unknowns = f"{self.map.numel()} unknowns"
        if self.group is None and self.elements == 1:
            return f"{text} ({unknowns})"
        other = "by one row alone" if self.group is None else f"without {self.group}"
        looks = f"{self.elements} {'rows' if self.group is None else 'elements'}"
        return f"{text} ({100 * self.without:.1f} % {other}; {looks}, {unknowns})"


def identifiability(
    source: LinearOperator | Likelihood,
    group: Group | None,
    *,
    rng: Rng,
    signal: float,
    noise_level: float | None = None,
    elements: int = 64,
    probes: int = 16,
    steps: int = 32,
    dense_up_to: int = 1024,
) -> Identifiability:
    """The spectrum of M, its seen share, and the map of what is not seen.

    Arguments:
        source: an operator, whose rows are several operators; or a likelihood that is quadratic in the image (linear
            operator, Gaussian noise), with its own noise and masks. group: or None, for the rows alone.
        rng: its first stream draws the elements. signal: s, standard deviation of the images along a unit direction, in
            the image's unit. noise_level: σ of a datum, in the data's unit, for an operator; None for a likelihood.
        elements: draws of the group, rounded up to a multiple of the rows; unused without a group. Few draws of a
            continuous group scatter the eigenvalues near 1, to both sides.
        probes, steps: of stochastic Lanczos quadrature, for images of more than `dense_up_to` values; below, the
            spectrum of the drawn elements is exact. With p probes a value of the map has an error of ½/√p at most.
    Raises: UnsupportedError if the source is not linear, or its precision depends on the image. DiffinvError if `signal`
        or `noise_level` is missing or not positive.
    References: Ubaru, Chen & Saad, *Fast estimation of tr(f(A)) via stochastic Lanczos quadrature*, 2017, SIMAX 38, 1075.
    """
    information, scale = _information(source, signal, noise_level)
    tensors = source.tensors()
    like = torch.zeros(1, *information.in_shape, dtype=torch.float64, device=tensors[0].device if tensors else "cpu")
    rows = [information.select([i]) for i in range(information.batch)]
    looks = rows if group is None else _transformed(rows, group, _streams(rng.spawn(0), _rounded(elements, len(rows))), like)
    whole = _mean(looks, scale)
    alone = [_mean([row], scale) for row in rows] if group is None else [_mean(rows, scale)]
    if like.numel() <= dense_up_to:
        found, others = _exact(whole, like), [_exact(single, like) for single in alone]
        start = torch.eye(like.numel(), dtype=like.dtype, device=like.device).unflatten(1, like.shape[1:])
    else:
        start = _streams(rng.spawn(1), probes).rademacher(like.expand(probes, *like.shape[1:]))
        found, others = _quadrature(whole, start, steps), [_quadrature(single, start, steps) for single in alone]
    unmoved = _mean(rows, scale)(start)
    moved = float((whole(start) - unmoved).norm() / unmoved.norm().clamp_min(torch.finfo(unmoved.dtype).tiny))
    name = None if group is None else type(group).__name__
    return Identifiability(found.spectrum, _pool(others), found.map, moved, found.error, name, len(looks))


def require_identifiable(found: Identifiability, *, least_seen: float, allow_unidentifiable: bool = False) -> None:
    """Refuse to train on a problem of which too much is unseen.

    Arguments: least_seen: share of image space that must be seen, 0 to 1. allow_unidentifiable: train all the same; what
        is unseen is then the network's invention.
    Raises: UnsupportedError with the figures.
    """
    if found.seen < least_seen and not allow_unidentifiable:
        raise UnsupportedError(
            f"{found}: {100 * least_seen:.1f} % is required; add operators or a group that moves the unseen part, "
            "or set allow_unidentifiable and treat that part as invented."
        )


def check_group_helps(found: Identifiability, *, tolerance: float = 1e-3) -> None:
    """Refuse a group that adds nothing to what the operator sees.

    Arguments: tolerance: share of image space below which the gain counts as none, beside twice its standard error.
    Raises: UnsupportedError with the reason: everything is seen already, the group commutes with AᵀPA, or what it moves
        into view stays below the noise; or where no group was tested.
    """
    if found.group is None:
        raise UnsupportedError("check_group_helps: no group was tested; pass one to identifiability().")
    if found.seen - found.without > tolerance + 2 * found.error:
        return
    if found.without >= 1 - tolerance:
        reason = "the operator alone sees everything; leave the equivariance term out"
    elif found.moved <= COMMUTES:
        reason = (
            "the transforms leave AᵀPA as it is, as shifts do for a convolution and turns for a round PSF; "
            "take a group that does not commute with the operator, such as dilations for a blur"
        )
    else:
        reason = f"they change AᵀPA by {100 * found.moved:.2g} %, but bring nothing unseen above the noise; take another group"
    raise UnsupportedError(f"{found.group} adds nothing, {found}: {reason}.")


@dataclass(frozen=True, eq=False)
class _Found:
    """Spectrum of one matrix, the diagonal of its unseen projector (C, H, W), and the standard error of `seen`."""

    spectrum: Spectrum
    map: Tensor
    error: float


def _information(source: Operator | Likelihood, signal: float, noise_level: float | None) -> tuple[LinearOperator, float]:
    """AᵀPA up to a factor, and that factor times s²."""
    _check_level("signal", signal, "give the spread of the images in their own unit.")
    if isinstance(source, Likelihood):
        if not source.quadratic:
            raise UnsupportedError(
                "identifiability: this likelihood's precision depends on the image; pass its operator (linearized at a typical "
                "image) and a noise_level."
            )
        if noise_level is not None:
            raise DiffinvError(f"identifiability: a likelihood has its own noise, got noise_level {noise_level}; leave it out.")
        source = source.to(torch.float64)
        device = source.tensors()[0].device if source.tensors() else "cpu"
        zero = torch.zeros(source.batch, *source.image_shape, dtype=torch.float64, device=device)
        return source.fisher(zero), signal**2
    if not isinstance(source, LinearOperator):
        raise UnsupportedError(
            f"identifiability: {type(source).__name__} is not linear; pass operator.linearize(x) at a typical image x."
        )
    _check_level("noise_level", noise_level, "give the standard deviation of a datum in the data's unit.")
    source = source.to(torch.float64)
    return Compose((source.H, source)), (signal / noise_level) ** 2


def _check_level(name: str, value: float | None, remedy: str) -> None:
    if value is None or not 0 < value < math.inf:
        raise DiffinvError(f"identifiability: {name} must be finite and > 0, got {value}; {remedy}")


def _rounded(count: int, rows: int) -> int:
    return rows * max(1, -(-count // rows))


def _streams(rng: Rng, count: int) -> Rng:
    """`count` independent streams from the first one."""
    return Rng(torch.cat([rng.spawn(k).keys[:1] for k in range(count)]))


def _transformed(rows: Sequence[LinearOperator], group: Group, rng: Rng, like: Tensor) -> list[LinearOperator]:
    """T_kᵀ (AᵀPA)_i T_k, i = k modulo the number of rows."""
    elements = group.draw(rng, tuple(like.shape[1:]), like)
    parts = [(elements.select([k]), rows[k % len(rows)]) for k in range(len(rng))]
    return [Compose((element.H, row, element)) for element, row in parts]


def _mean(operators: Sequence[LinearOperator], scale: float) -> LinearMap:
    return lambda v: scale / len(operators) * sum(operator(v) for operator in operators)


def _pool(found: Sequence[_Found]) -> Spectrum:
    """The spectra of several matrices as one: its seen share is the mean of theirs."""
    values = torch.cat([f.spectrum.values for f in found])
    weights = torch.cat([f.spectrum.weights for f in found]) / len(found)
    return _sorted(values, weights)


def _sorted(values: Tensor, weights: Tensor) -> Spectrum:
    order = values.argsort(descending=True)
    return Spectrum(values[order], weights[order])


def _exact(operator: LinearMap, like: Tensor) -> _Found:
    matrix = dense(operator, like)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    unseen = vectors[:, values <= 1].square().sum(1)
    weights = torch.full_like(values, 1 / len(values))
    return _Found(_sorted(values, weights), unseen.reshape(like.shape[1:]).clamp(0, 1), 0.0)


def _quadrature(operator: LinearMap, start: Tensor, steps: int) -> _Found:
    """Lanczos from ±1 probes: nodes and weights of the spectrum, and z ⊙ (projector z) for its diagonal."""
    shape: Shape = tuple(start.shape[1:])
    size = math.prod(shape)
    basis, tridiagonal = _lanczos(operator, start, min(steps, size))
    nodes, mix = torch.linalg.eigh(tridiagonal)
    weights = mix[:, 0].square()
    unseen = torch.einsum("bkj,bj,bj->bk", mix, mix[:, 0], (nodes <= 1).to(mix.dtype))
    projected = math.sqrt(size) * torch.einsum("bk,bkn->bn", unseen, basis)
    share = (weights * (nodes > 1)).sum(1)
    error = float(share.std() / math.sqrt(len(share))) if len(share) > 1 else math.inf
    diagonal = (start.flatten(1) * projected).mean(0).reshape(shape)
    return _Found(_sorted(nodes.flatten(), weights.flatten() / len(start)), diagonal.clamp(0, 1), error)


def _lanczos(operator: LinearMap, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Orthonormal Krylov bases (B, k, n) and tridiagonal matrices (B, k, k), orthogonalised twice against all before.

    A row whose Krylov space is exhausted gets zero vectors from there on, which carry no weight.
    """
    vector = start.flatten(1) / start.flatten(1).norm(dim=1, keepdim=True)
    basis, matrix = vector[:, None], start.new_zeros(len(start), steps, steps)
    for k in range(steps):
        product = operator(basis[:, k].reshape(start.shape)).flatten(1)
        matrix[:, k, k] = (basis[:, k] * product).sum(1)
        size = product.norm(dim=1)
        for _ in range(2):
            overlap = (basis @ product[..., None])[..., 0]
            product = product - (overlap[:, None] @ basis)[:, 0]
        if k + 1 == steps:
            break
        length = product.norm(dim=1)
        fresh = length > 1e-10 * size
        matrix[:, k, k + 1] = matrix[:, k + 1, k] = torch.where(fresh, length, 0.0)
        vector = torch.where(fresh[:, None], product / torch.where(fresh, length, 1.0)[:, None], 0.0)
        basis = torch.cat([basis, vector[:, None]], 1)
    return basis, matrix
