"""Gaussian priors from corrupted data by closed-form expectation maximisation: the start of every other EM, in seconds.

E-step: the exact posterior of each image under the present Gaussian; M-step: the mean and covariance of these posteriors. The
likelihood of the data never falls. Two structures, each exact for data whose information is diagonal in its own way:

* `fourier_em`, stationary: `S_k ← mean_i [|m̂_ik − m_k|² + C_ik]`, C_ik = S_k v_ik/(|h_ik|² S_k + v_ik), a frequency at a time,
  for blurs h_i and noise spectra v_i of each image's own. A blur on an empty sky is taken for one on the torus.
* `low_rank_em`, x = m + W u + √ψ e with u, e ~ N(0, I): factor analysis, for masks and noise of each pixel's own.

Data may be of any mixture of instruments (a list of observations); frequencies or pixels that none of them sees keep their start,
which for frequencies is the power law that explains the others best: images are not white where nobody has looked.
References: Dempster, Laird & Rubin 1977; Rubin & Thayer, *EM algorithms for ML factor analysis*, 1982; Tipping & Bishop,
*Probabilistic principal component analysis*, 1999; Liu, Rubin & Wu, *Parameter expansion to accelerate EM*, 1998; as a start
for diffusion priors: Rozet, Andry, Lanusse & Louppe 2024, arXiv:2405.13712.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinv.core.checks import DiffinvError, UnsupportedError
from diffinv.likelihood import Observation
from diffinv.noise.gaussian import Gaussian
from diffinv.priors.analytic import LOG_2PI, FourierGaussianPrior, LowRankGaussianPrior
from diffinv.priors.base import Denoiser
from diffinv.reconstructors.observed import clean_data, require_diagonal
from diffinv.reconstructors.spectra import noise_spectrum, transfer_of

_SOME, _EVALUATIONS = 256, 60  # of the start: rows, evaluations of their likelihood
_LEAST, _FLOOR = 1e-300, 1e-12  # of powers; of a spectrum, in units of its highest value: zero is where EM never leaves


@dataclass(frozen=True)
class GaussianFit:
    """prior: float32. log_likelihood: of all data before each lap and after the last, never falling."""

    prior: Denoiser
    log_likelihood: tuple[float, ...]


@dataclass(frozen=True)
class _Frequencies:
    """Coefficients ŷ, transfers h and variances v of data: (B, C, H, W) or broadcastable to it. seen: (B, C, 1, 1), of which
    channels of which rows there are data; v is ∞ of the others."""

    y: Tensor
    h: Tensor
    v: Tensor
    seen: Tensor

    @classmethod
    def of(cls, data: Observation) -> _Frequencies:
        y = torch.fft.fft2(clean_data(data).double(), norm="ortho")
        h = transfer_of(data.operator).to(y.device)
        v = noise_spectrum(data.noise, tuple(data.y.shape[1:])).to(y.device)
        return cls(y, h, v, v[..., :1, :1].isfinite().expand(*y.shape[:2], 1, 1))

    def every(self, step: int) -> _Frequencies:
        """Each `step`-th row."""
        h, v = (t if len(t) == 1 else t[::step] for t in (self.h, self.v))
        return _Frequencies(self.y[::step], h, v, self.seen[::step])

    def log_likelihood(self, mean: Tensor | float, spectrum: Tensor) -> Tensor:
        """Of each channel: (C,)."""
        variance = self.h.abs() ** 2 * spectrum + self.v
        power = (self.y - self.h * mean).abs() ** 2
        terms = (power / variance + variance.log() + LOG_2PI).expand(self.y.shape)
        return -terms.where(self.seen, 0.0).sum((0, 2, 3)) / 2

    def posterior(self, mean: Tensor, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """m̂ (B, C, H, W) complex, and C real; both 0 where nothing is seen."""
        variance = self.h.abs() ** 2 * spectrum + self.v
        centre = mean + spectrum * self.h.conj() / variance * (self.y - self.h * mean)
        return centre.where(self.seen, 0.0), (spectrum * self.v / variance).expand(self.y.shape).where(self.seen, 0.0)


def fourier_em(data: Sequence[Observation], *, laps: int, mean_image: bool) -> GaussianFit:
    """A stationary Gaussian prior of images seen through convolutions and stationary noise.

    A channel learns from the rows that show it: one that is masked altogether in a row is a datum less, not a black image.

    Arguments: data: observations of images of one shape, each with its own blurs and noise. laps: EM iterations; where
    |h|² S ≪ v they converge slowly, so that faint frequencies keep a part of their start. mean_image: whether the mean is an
    image (objects in the centre of their stamps) or one number a channel (anything anywhere).
    Returns: the fit; it starts from the likeliest power law, see `_power_law`.
    Raises: UnsupportedError for other operators and noise, DiffinvError for images of different shapes, and for a channel that
    no row shows.
    """
    _one_shape([tuple(d.operator.in_shape) for d in data])
    parts = [_Frequencies.of(d) for d in data]
    count = _rows_a_channel(parts)
    if not bool(count.all()):
        raise DiffinvError(f"Gaussian EM: no row shows channel {int((count == 0).flatten().nonzero()[0])}; leave it out.")
    mean = torch.zeros_like(parts[0].y[:1])
    spectrum = _power_law(parts)
    found = [float(sum(p.log_likelihood(mean, spectrum) for p in parts).sum())]
    for _ in range(laps):
        beliefs = [p.posterior(mean, spectrum) for p in parts]
        mean = sum(centre.sum(0, keepdim=True) for centre, _ in beliefs) / count
        if not mean_image:
            mean = _constant(mean)
        pairs = zip(parts, beliefs, strict=True)
        spectrum = sum((((c - mean).abs() ** 2).where(p.seen, 0.0) + v).sum(0, keepdim=True) for p, (c, v) in pairs) / count
        spectrum = (spectrum + spectrum.flip(-2, -1).roll((1, 1), (-2, -1))) / 2  # even but for rounding
        found.append(float(sum(p.log_likelihood(mean, spectrum) for p in parts).sum()))
    image = torch.fft.ifft2(mean, norm="ortho").real
    return GaussianFit(FourierGaussianPrior(image, spectrum).float(), tuple(found))


def _rows_a_channel(parts: Sequence[_Frequencies]) -> Tensor:
    """Of which there are data: (1, C, 1, 1)."""
    return sum(p.seen.sum(0, keepdim=True) for p in parts)


def _power_law(parts: Sequence[_Frequencies]) -> Tensor:
    """The likeliest `S(k) = A (1 + (k/k₀)²)^(−γ/2)`, 0 < γ < 8, of images without a mean, by some of the data: (1, C, H, W).

    Found by L-BFGS from nearly white spectra.
    """
    step = max(1, sum(len(p.y) for p in parts) // _SOME)
    some = [p.every(step) for p in parts]
    some = some if bool(_rows_a_channel(some).all()) else parts
    rows, columns = parts[0].y.shape[2:]
    count = _rows_a_channel(some).flatten() * rows * columns
    frequency = lambda n: torch.fft.fftfreq(n, dtype=torch.float64, device=parts[0].y.device)
    squares = frequency(rows)[:, None] ** 2 + frequency(columns) ** 2
    power = sum((p.y.abs() ** 2).sum((0, 2, 3)) for p in some)
    gain = sum((p.h.abs() ** 2).expand(p.y.shape).where(p.seen, 0.0).sum((0, 2, 3)) for p in some)
    height = (power / gain.clamp_min(_LEAST)).clamp_min(_LEAST).log()
    first = torch.stack([height, torch.zeros_like(height), torch.zeros_like(height)])
    theta = first.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS([theta], max_iter=_EVALUATIONS, max_eval=_EVALUATIONS, line_search_fn="strong_wolfe")

    def spectrum(values: Tensor) -> Tensor:
        height, knee, slope = values[:, :, None, None]
        return (height - 4 * torch.sigmoid(slope) * torch.log1p(squares * torch.exp(-2 * knee))).exp()[None]

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -(sum(p.log_likelihood(0.0, spectrum(theta)) for p in some) / count).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    found = spectrum(theta.detach())
    found = found if bool(found.isfinite().all()) else spectrum(first)
    return found.clamp_min(_FLOOR * found.amax((2, 3), keepdim=True))


def _constant(mean: Tensor) -> Tensor:
    """With nothing but the zero frequency."""
    kept = torch.zeros_like(mean)
    kept[..., 0, 0] = mean[..., 0, 0]
    return kept


@dataclass(frozen=True)
class _Pixels:
    """Data in the unit of the image, 0 where unseen, and their information 1/v, 0 there: both (B, n)."""

    y: Tensor
    information: Tensor

    @classmethod
    def of(cls, data: Observation) -> _Pixels:
        scale = require_diagonal("low_rank_em", data).double()
        if not isinstance(data.noise, Gaussian):
            raise UnsupportedError(f"low_rank_em: {type(data.noise).__name__} is not independent Gaussian noise; use fourier_em.")
        variance = data.noise.variance(torch.zeros_like(data.y)).double()
        information = (scale**2 / variance).expand(data.y.shape)
        seen = information > 0
        y = (data.y.double() / torch.where(seen, scale.expand(seen.shape), 1.0)).where(seen, 0.0)
        return cls(y.flatten(1), information.flatten(1))


@dataclass(frozen=True)
class _Factors:
    """m (n,), W (n, r) and ψ."""

    mean: Tensor
    factor: Tensor
    rest: Tensor

    def latent(self, data: _Pixels) -> tuple[Tensor, Tensor, Tensor]:
        """E[u | y] (B, r), Cov[u | y] (B, r, r), and the log-likelihood (B,)."""
        weight = data.information / (1 + self.rest * data.information)  # 1/(ψ + v)
        gap = data.y - self.mean
        rank = self.factor.shape[1]
        outer = (self.factor[:, :, None] * self.factor[:, None]).flatten(1)
        precision = torch.eye(rank, dtype=gap.dtype, device=gap.device) + (weight @ outer).unflatten(1, (rank, rank))
        root = torch.linalg.cholesky(precision)
        along = (weight * gap) @ self.factor
        u = torch.cholesky_solve(along[:, :, None], root)[:, :, 0]
        seen = data.information > 0
        log_det = 2 * root.diagonal(dim1=1, dim2=2).log().sum(1) - weight.where(seen, 1.0).log().sum(1)
        square = (weight * gap**2).sum(1) - (along * u).sum(1)
        return u, torch.cholesky_inverse(root), -(square + log_det + LOG_2PI * seen.sum(1)) / 2


@dataclass(frozen=True)
class _Moments:
    """Sums over images of E[x ũᵀ] (n, r + 1), E[ũ ũᵀ] (r + 1, r + 1), E[x²] and the log-likelihood; ũ = (u, 1)."""

    cross: Tensor
    latent: Tensor
    square: Tensor
    log_likelihood: Tensor

    @classmethod
    def of(cls, model: _Factors, data: _Pixels) -> _Moments:
        u, covariance, log_likelihood = model.latent(data)
        one = torch.cat([u, torch.ones_like(u[:, :1])], 1)
        second = one[:, :, None] * one[:, None]
        second[:, :-1, :-1] += covariance
        both = torch.cat([model.factor, model.mean[:, None]], 1)
        share = model.rest * data.information / (1 + model.rest * data.information)  # of a datum in E[x | u, y]
        size = one.shape[1]
        unseen = ((1 - share).T @ second.flatten(1)).unflatten(1, (size, size))
        cross = torch.einsum("ps,pst->pt", both, unseen) + (share * data.y).T @ one
        predicted = one @ both.T
        spread = ((1 - share) ** 2).T @ second.flatten(1)
        square = (spread * (both[:, :, None] * both[:, None]).flatten(1)).sum()
        square = square + (2 * (1 - share) * share * data.y * predicted + (share * data.y) ** 2).sum()
        square = square + (model.rest * (1 - share)).sum()
        return cls(cross, second.sum(0), square, log_likelihood.sum())


_IMAGES = 512  # at once


def low_rank_em(data: Sequence[Observation], *, rank: int, laps: int) -> GaussianFit:
    """A Gaussian prior of low rank plus a rest, of images seen through masks or weights with independent Gaussian noise.

    Arguments: data: observations of images of one shape. rank: r of W, below the number of pixels. laps: EM iterations.
    Returns: the fit; it starts from the principal components of the data, each pair of pixels where both were seen.
    Raises: UnsupportedError for operators that mix pixels or other noise; DiffinvError for a rank that is too large.
    """
    shape = _one_shape([tuple(d.operator.in_shape) for d in data])
    chunks = [part for d in data for part in _chunks(_Pixels.of(d))]
    size, count = chunks[0].y.shape[1], sum(len(c.y) for c in chunks)
    if not 1 <= rank < min(size, count):
        raise DiffinvError(f"low_rank_em: rank {rank} of {size} pixels and {count} images; give 1 or more, and less than both.")
    model, found = _start(chunks, rank), []
    for _ in range(laps):
        moments = [_Moments.of(model, chunk) for chunk in chunks]
        found.append(float(sum(m.log_likelihood for m in moments)))
        cross, latent = sum(m.cross for m in moments), sum(m.latent for m in moments)
        both = torch.linalg.solve(latent, cross.T).T
        rest = (sum(m.square for m in moments) - (both * cross).sum()) / (count * size)
        model = _standardised(both, latent / count, rest)
    found.append(float(sum(model.latent(chunk)[2].sum() for chunk in chunks)))
    prior = LowRankGaussianPrior(model.mean.reshape(1, *shape), model.factor, model.rest).float()
    return GaussianFit(prior, tuple(found))


def _standardised(both: Tensor, latent: Tensor, rest: Tensor) -> _Factors:
    """W and m for latent variables of mean 0 and covariance I, from those of the present moments E[ũ ũᵀ] of u.

    Without it (parameter expansion) a low noise pins u to the present W, whose size then hardly moves from lap to lap.
    """
    centre = latent[:-1, -1]
    root = torch.linalg.cholesky(latent[:-1, :-1] - centre[:, None] * centre)
    return _Factors(both[:, -1] + both[:, :-1] @ centre, both[:, :-1] @ root, rest)


def _start(chunks: list[_Pixels], rank: int) -> _Factors:
    """Principal components of the data, noise included."""
    seen = sum((c.information > 0).sum(0) for c in chunks)
    mean = sum(c.y.sum(0) for c in chunks) / seen.clamp_min(1)
    gaps = [(c.y - mean).where(c.information > 0, 0.0) for c in chunks]
    pairs = sum((c.information > 0).to(mean).T @ (c.information > 0).to(mean) for c in chunks)
    covariance = sum(g.T @ g for g in gaps) / pairs.clamp_min(1)  # of the images that show both pixels
    values, vectors = torch.linalg.eigh(covariance)
    rest = values[:-rank].mean().clamp_min(1e-6 * values[-1].abs())
    return _Factors(mean, vectors[:, -rank:] * (values[-rank:] - rest).clamp_min(1e-3 * rest).sqrt(), rest)


def _chunks(data: _Pixels) -> list[_Pixels]:
    pairs = zip(data.y.split(_IMAGES), data.information.expand(data.y.shape).split(_IMAGES), strict=True)
    return [_Pixels(y, information) for y, information in pairs]


def _one_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    if len(set(shapes)) != 1:
        raise DiffinvError(f"Gaussian EM: images of the shapes {sorted(set(shapes))}; cut them to one.")
    return shapes[0]
