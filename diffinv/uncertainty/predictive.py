"""Posterior predictive χ²: whether the data look like data of the draws. Works on one real object, without truth.

    T(y, x) = Σ whitened residual²(y − A x)/m,   about 1 for a draw (the residual of the posterior *mean* has m − p_eff in place
    of m).

If x_m is a draw of p(x | y) and y of p(y), then (x_m, y) is a draw of the joint distribution, so that T(y, x_m) of *one* draw is
distributed as T(y', x_m) with y' = A x_m + n. Replicates y' of one draw chosen at random give an exactly uniform p-value, and
exchangeable labels of y and y'. (The usual posterior predictive p-value, which averages over draws, is not uniform: it gathers
at ½ and has no power there.) Catches: noise that is larger or smaller than its model, a wrong operator, draws that do not fit
the data, draws that fit too well. Cannot catch: anything in the null space of the operator; a wrong prior that the data do not
contradict.
References: Johnson, *Bayesian model assessment using pivotal quantities*, 2007; Gosselin, *A new calibrated Bayesian internal
goodness-of-fit method: sampled posterior p-values as simple and general p-values that allow double use of the data*, 2011;
Gelman, Meng & Stern, *Posterior predictive assessment of model fitness via realized discrepancies*, 1996.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.core.types import Image
from diffinv.likelihood import Joint, Likelihood, Observation
from diffinv.uncertainty.finding import Finding
from diffinv.uncertainty.nulls import REPLICATES, exchange_test, findings, integers, streams, two_sided

_ROWS = 1 << 22  # image elements of replicates at once


def reduced_chi2(likelihood: Likelihood, x: Image) -> Tensor:
    """Σ whitened residual² / number of good data: (B,), about 1 for the truth; 0 without data."""
    residuals = likelihood.residuals(x)
    if not residuals:
        return torch.zeros(x.shape[0], device=x.device)
    return sum(r.double().pow(2).flatten(1).sum(1) for r in residuals) / sum(n.double() for n in likelihood.good())


def replicated(likelihood: Likelihood, x: Image, rng: Rng) -> Likelihood:
    """The likelihood with data drawn from p(y | x) in place of its own. x: (B, *image). rng: B streams.

    Raises: UnsupportedError for a likelihood without data.
    """
    if isinstance(likelihood, Observation):
        return replace(likelihood, y=likelihood.noise.sample(likelihood.operator(x), rng))
    if isinstance(likelihood, Joint):
        return Joint(tuple(replicated(part, x, rng.spawn(k)) for k, part in enumerate(likelihood.parts)))
    raise UnsupportedError(f"replicated: {type(likelihood).__name__} has no data to draw again; give an Observation or a Joint.")


def predictive_table(likelihood: Likelihood, samples: Tensor, rng: Rng, *, replicates: int = REPLICATES) -> Tensor:
    """T(y, x_m) of one draw an object chosen at random (label 0), and T of K replicates of its data: (N, K + 1).

    Arguments: likelihood: of N objects. samples: (N, M, *image), in the image's unit. rng: one stream.
    Raises: UnsupportedError without data; DiffinvError if the likelihood is of another number of objects.
    """
    objects, draws = samples.shape[:2]
    if likelihood.batch not in (1, objects):
        raise DiffinvError(f"predictive_table: data of {likelihood.batch} objects but draws of {objects}; give as many of both.")
    chosen = integers(rng, draws, (objects,), samples)
    x = samples[torch.arange(objects, device=samples.device), chosen]
    keys, total = streams(rng.spawn(1), objects * replicates), objects * replicates
    size = max(1, _ROWS // x[0].numel())
    null = []
    for start in range(0, total, size):
        rows = torch.arange(start, min(start + size, total), device=x.device) // replicates
        part, images = likelihood.select(rows), x[rows]
        null.append(reduced_chi2(replicated(part, images, keys.select(slice(start, start + size))), images))
    return torch.cat([reduced_chi2(likelihood, x)[:, None], torch.cat(null).unflatten(0, (objects, replicates))], 1)


def predictive_chi2(likelihood: Likelihood, samples: Tensor, rng: Rng) -> tuple[Finding, ...]:
    """A finding an object, two-sided, and for more than one the mean of T over objects at the end.

    Arguments: as `predictive_table`.
    """
    objects, draws = samples.shape[:2]
    table = predictive_table(likelihood, samples, rng.spawn(0))
    found = findings(two_sided(table[:, 0], table[:, 1:]), "predictive χ²", "a draw of object", draws)
    if objects > 1:
        found += (exchange_test(table, rng.spawn(1)).finding("predictive χ²", "mean of objects", objects, draws),)
    return found
