"""Linear unmixing: spectra as convex sums of a few endmembers, y = Σ_c a_c e_c, a ≥ 0, Σ a = 1, known or not.

Endmembers are found as the corners of the data's simplex (vertex component analysis) and refined with the abundances by
non-negative factorisation, in which some may be held: a component known by its training set is held as a few of its spectra,
between which it may lie, and its abundance is the sum of theirs. Abundances of given endmembers are least squares on the simplex.
Invariant: abundances are ≥ 0, and add up to 1 exactly where they must.

References: Nascimento & Dias, *Vertex component analysis*, 2005; Heinz & Chang, *Fully constrained least squares linear spectral
mixture analysis*, 2001; Cichocki & Phan, *Fast local algorithms for large scale nonnegative matrix factorizations*, 2009.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, ShapeError
from diffinv.core.rng import Rng

_STEPS = 5  # of the abundances a step of the endmembers


def vertices(y: Tensor, count: int, rng: Rng, known: Tensor | None = None, *, tries: int = 20) -> Tensor:
    """Indices of `count` spectra at corners of the simplex of y (N, K) beside those known, by vertex component analysis.

    Spectra are projected onto the first singular vectors, one a corner, and scaled onto the plane ⟨x, x̄⟩ = 1; each corner is the
    extreme of a random direction orthogonal to those known and found; of several tries the one with the largest simplex. Exact
    where there is no noise and every endmember has a pure pixel.

    Arguments: known: (C, K) spectra of other corners, none by default. tries: sets of random directions.
    Raises: DiffinvError if there are fewer spectra, channels or dimensions than corners.
    """
    whole = count if known is None else count + len(known)
    basis = torch.linalg.svd(y.mT @ y)[0][:, :whole]
    x = y @ basis
    if min(y.shape) < whole or int(torch.linalg.matrix_rank(x)) < whole:
        raise DiffinvError(f"vertices: {tuple(y.shape)} spectra do not span {whole} dimensions; ask for fewer endmembers.")
    centre = x.mean(0)
    along = x @ centre
    seen = along > 1e-6 * along.mean()
    x = torch.where(seen[:, None], x / torch.where(seen, along, 1.0)[:, None], 0.0)
    given = x[:0] if known is None else (known @ basis) / (known @ basis @ centre)[:, None]
    found = [_extremes(x, given, directions) for directions in rng.normal(x.new_empty(1, tries, whole, whole))[0]]
    volume = [float(torch.linalg.det(torch.cat([given, x[chosen]])).abs()) for chosen in found]
    return torch.tensor(found[max(range(tries), key=volume.__getitem__)])


def _extremes(x: Tensor, given: Tensor, directions: Tensor) -> list[int]:
    """One corner a direction beyond those given: the extreme along what of it is orthogonal to the corners before."""
    corners, chosen = given, []
    for direction in directions[len(given) :]:
        across = direction - corners.mT @ (torch.linalg.pinv(corners.mT) @ direction) if len(corners) else direction
        chosen.append(int((x @ across).abs().argmax()))
        corners = torch.cat([corners, x[chosen[-1:]]])
    return chosen


def abundances(y: Tensor, endmembers: Tensor, *, add_up: bool = True, iterations: int = 2000, tol: float = 1e-9) -> Tensor:
    """Least squares a ≥ 0 (and Σ a = 1 if they are to `add_up`): (N, C) of y (N, K) and endmembers (C, K).

    Accelerated projected gradient, ended by a step below `tol` anywhere.
    """
    gram, target = endmembers @ endmembers.mT, y @ endmembers.mT
    project = on_simplex if add_up else lambda a: a.clamp_min(0)
    length = 1 / torch.linalg.eigvalsh(gram)[-1]
    a = project(torch.full_like(target, 1 / len(endmembers)))
    ahead, momentum = a, 1.0
    for _ in range(iterations):
        new = project(ahead - length * (ahead @ gram - target))
        faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        rising = ((ahead - new) * (new - a)).sum(1, keepdim=True) > 0  # restart, a pixel
        ahead = torch.where(rising, new, new + (momentum - 1) / faster * (new - a))
        step, a, momentum = float((new - a).abs().max()), new, faster
        if step < tol:
            break
    return a


def on_simplex(a: Tensor) -> Tensor:
    """The nearest point with a ≥ 0 and Σ a = 1, of each row."""
    falling = a.sort(1, descending=True).values
    excess = (falling.cumsum(1) - 1) / torch.arange(1, a.shape[1] + 1).to(a)
    last = (falling > excess).sum(1, keepdim=True) - 1
    return (a - excess.gather(1, last)).clamp_min(0)


@dataclass(frozen=True, eq=False)
class Factors:
    """abundance (N, C), endmembers (C, K), and |y − A E|² after each iteration."""

    abundance: Tensor
    endmembers: Tensor
    loss: tuple[float, ...]


def factorise(y: Tensor, start: Tensor, *, held: Tensor, iterations: int) -> Factors:
    """min |y − A E|² with A, E ≥ 0 and Σ a = 1: projected gradient steps of A, then each row of E that is not held in turn,

        e_c ← [e_c + a_cᵀ (y − A E)/|a_c|²]₊,   the exact minimum of a row, so that the loss never rises.

    Arguments: y: (N, K). start: E (C, K) ≥ 0. held: (C,), True for rows of E that stay.
    Raises: DiffinvError if an endmember is negative; ShapeError unless there is one `held` an endmember.
    """
    if bool((start < 0).any()):
        raise DiffinvError("factorise: endmembers must be ≥ 0; clip what noise has made negative.")
    if held.shape != start.shape[:1]:
        raise ShapeError(f"factorise: {len(held)} of `held` for {len(start)} endmembers; give one each.")
    a, e, losses = abundances(y, start), start.clone(), []
    for _ in range(iterations):
        gram, target = e @ e.mT, y @ e.mT
        length = 1 / torch.linalg.eigvalsh(gram)[-1]
        for _ in range(_STEPS):
            a = on_simplex(a - length * (a @ gram - target))
        gram, target = a.mT @ a, a.mT @ y
        for row in (~held).nonzero()[:, 0].tolist():
            e[row] = (e[row] + (target[row] - gram[row] @ e) / gram[row, row].clamp_min(1e-12)).clamp_min(0)
        losses.append(float((y - a @ e).pow(2).sum()))
    return Factors(a, e, tuple(losses))


def spectral_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle between rows of a and b, both (C, K), in radians: blind to brightness."""
    unit = lambda v: v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    half = torch.linalg.vector_norm(unit(a) - unit(b), dim=1) / 2
    return 2 * torch.asin(half.clamp(max=1.0))
