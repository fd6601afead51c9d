"""Interpolatory autoencoders: spectra as barycentres of a few anchors in a latent space.

    λ(x) = argmin ‖Φ(x) − λ Φ(A)‖² + ε‖λ‖²  with Σ λ = 1,   x̂ = Ψ(λ Φ(A)),

which has the closed form λ = (Φ(x) Φ(A)ᵀ + μ 1ᵀ) G⁻¹, G = Φ(A) Φ(A)ᵀ + ε I, μ such that the weights add up to 1.
Layers are h ← lReLU(W h + b) + r_l h as published; anchors are found by farthest points.
Invariant: Σ λ = 1, and an anchor's own weights are a unit vector as ε → 0.

References: Bobin, Acero & Picquenot, *Metric learning for semi-supervised sparse source separation with spectral examples*, 2021
(arXiv:2011.10985 for the follow-up on interpolatory autoencoders); Lascar, Bobin & Acero, SUSHI, 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinv.core.rng import Rng


def barycentric_weights(latent: Tensor, anchors: Tensor, ridge: float) -> Tensor:
    """λ (B, a) of latent points (B, d) about anchors (a, d). ridge: ε over the mean of the anchors' ‖Φ(A)‖²."""
    gram = anchors @ anchors.mT
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(anchors)).to(gram)
    sides = torch.cat([anchors @ latent.mT, torch.ones(len(anchors), 1).to(gram)], 1)
    solved = torch.linalg.solve(gram, sides)
    free, ones = solved[:, :-1].mT, solved[:, -1]
    multiplier = (1 - free.sum(1, keepdim=True)) / ones.sum()
    return free + multiplier * ones


def farthest_points(x: Tensor, count: int) -> Tensor:
    """Indices of `count` rows of x (N, d): the one farthest from the mean, then each time the farthest from those chosen."""
    chosen = [int((x - x.mean(0)).pow(2).sum(1).argmax())]
    distance = (x - x[chosen[0]]).pow(2).sum(1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).pow(2).sum(1))
    return torch.tensor(chosen)


class LeakyLayers(nn.Module):
    """h ← lReLU(W_l h + b_l) + r h, all of one width; r of the first published layers, fixed."""

    def __init__(self, width: int, layers: int, residual: float) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.residual = residual

    def forward(self, h: Tensor) -> Tensor:
        for linear in self.linear:
            h = functional.leaky_relu(linear(h), 0.1) + self.residual * h
        return h


class InterpolatoryAutoencoder(nn.Module):
    """The published model on spectra of K channels.

    Arguments: anchors: (a, K) spectra. layers: of encoder and decoder. residual: r. ridge: ε, see `barycentric_weights`.
    """

    def __init__(self, anchors: Tensor, *, layers: int = 2, residual: float = 0.1, ridge: float = 1e-6) -> None:
        super().__init__()
        self.register_buffer("anchors", anchors)
        width = anchors.shape[1]
        self.encoder, self.decoder = (LeakyLayers(width, layers, residual) for _ in range(2))
        self.ridge = ridge

    def weights(self, x: Tensor) -> Tensor:
        """λ (B, a) of spectra (B, K)."""
        return barycentric_weights(self.encoder(x), self.encoder(self.anchors), self.ridge)

    def decode(self, weights: Tensor) -> Tensor:
        """(B, a) → (B, K)."""
        return self.decoder(weights @ self.encoder(self.anchors))

    def loss(self, x: Tensor, latent_weight: float) -> Tensor:
        """‖x̂ − x‖² + μ ‖Φ(x) − λ Φ(A)‖², mean over the rows; both relative to the mean of ‖x‖²."""
        latent, anchors = self.encoder(x), self.encoder(self.anchors)
        near = barycentric_weights(latent, anchors, self.ridge) @ anchors
        miss = (self.decoder(near) - x).pow(2).sum(1) + latent_weight * (latent - near).pow(2).sum(1)
        return miss.mean() / x.pow(2).sum(1).mean()


@dataclass(frozen=True)
class TrainingPlan:
    """Adam with a cosine to zero. rate: the first step size. batch: rows a step. seed: of initialisation and batches."""

    steps: int
    batch: int
    rate: float
    seed: int = 0


def initialise(network: nn.Module, seed: int, *, bias: float = 0.0) -> None:
    """Weights of every linear layer ~ N(0, 1/fan-in), biases ~ N(0, bias²), from the seed alone."""
    for k, module in enumerate(m for m in network.modules() if isinstance(m, nn.Linear)):
        rng = Rng.for_draws(seed, [k], 1)
        with torch.no_grad():
            module.weight.copy_(rng.normal(module.weight[None])[0] / module.in_features**0.5)
            module.bias.copy_(bias * rng.normal(module.bias[None])[0])


def batches(count: int, plan: TrainingPlan) -> list[Tensor]:
    """Row numbers of each step's batch: passes over shuffled rows, (steps, batch or all)."""
    size, order = min(plan.batch, count), []
    for lap in range(-(-plan.steps // (count // size))):
        shuffled = Rng.for_draws(plan.seed, [lap], 1).uniform(torch.empty(1, count))[0].argsort()
        order += list(shuffled[: count // size * size].split(size))
    return order[: plan.steps]


def train_autoencoder(network: InterpolatoryAutoencoder, x: Tensor, plan: TrainingPlan, *, latent_weight: float = 0.1) -> float:
    """Train on spectra (N, K); returns the loss over all of them. `initialise` first for a result that the seed decides."""
    optimiser = torch.optim.Adam(network.parameters(), lr=plan.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, plan.steps)
    for rows in batches(len(x), plan):
        optimiser.zero_grad()
        network.loss(x[rows], latent_weight).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return float(network.loss(x, latent_weight))
