"""Fine-tuning of a trained reconstructor on one measurement, kept only if a part of the data that it never saw says so.

A self-supervised loss needs no second image: its randomness (recorruption, hiding, probes, transforms) makes a batch of one
row. But the weights then follow the noise of that row, and the loss on it, SURE with fresh probes included, is no longer
unbiased. So the measurement is split into two of independent noise, `(y₁, y₂) = noise.split(y)`: the copy learns from y₁
alone, and y₂ judges start and copy at y₁,

    gain = (‖A f₀(y₁) − y₂‖² − ‖A f₁(y₁) − y₂‖²)/d,   E[gain | y₁] = (‖A (f₀(y₁) − x)‖² − ‖A (f₁(y₁) − x)‖²)/d,

whatever f₁ made of y₁, with a standard error that only the noise of y₂ enters: that of `2 ⟨A f₀ − A f₁, n₂⟩/d`.
Invariant: the start is never changed, and what is returned is one of the two models that were judged.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffinv.core.checks import DiffinvError
from diffinv.core.rng import Rng
from diffinv.likelihood import Observation
from diffinv.losses.base import Loss, MeasuredBatch, mean_good
from diffinv.reconstructors.observed import clean_data, good_data, whole
from diffinv.training.loop import Trainer
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Measured

_SPLIT, _JUDGE = 0xADA97, 0x10D6E  # streams apart from those of the training
_DRAWS = 256  # of the noise: the standard error is known to 4 %


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What came of a fine-tuning.

    Arguments: model: the adapted one, or the start where that was not beaten. before, after: `‖A f(y₁) − x‖²` a datum of the
    start and of the adapted model, estimated from y₂, in the square of the data's unit (each with noise of its own, so that
    they can be negative). gain: before − after. error: standard error of the gain. kept: whether `model` is the adapted one.
    """

    model: nn.Module
    before: float
    after: float
    gain: float
    error: float
    kept: bool


def every(model: nn.Module) -> list[nn.Parameter]:
    """All parameters."""
    return list(model.parameters())


def gains(model: nn.Module) -> list[nn.Parameter]:
    """Scales and offsets of the normalisation layers: a few numbers a feature, too few to learn one image's noise by heart.

    References: Mohan et al., *Adaptive Denoising via GainTuning*, 2021, arXiv:2107.12815, who adapt a factor a feature.
    """
    kinds = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    return [p for part in model.modules() if isinstance(part, kinds) for p in part.parameters()]


def adapt(
    model: nn.Module,
    loss: Loss,
    observation: Observation,
    plan: TrainingPlan,
    *,
    share: float,
    parts: Callable[[nn.Module], Sequence[nn.Parameter]],
) -> Adaptation:
    """A copy of a trained model, trained on by `loss` on one measurement, if its gain exceeds the gain's standard error.

    Every batch holds `plan.batch_size` draws of the one row, so that the noise of a probe or a recorruption averages out. A
    single image is soon learnt by heart: give few steps (tens to a few hundred), a warm-up that is shorter, and a decay of
    the average that forgets the start within them.

    Arguments: model: f₀, what `loss` calls; not changed. observation: one row. plan: of the fine-tuning; its seed draws the
    split as well. share: of the Fisher information that is learnt from; the rest judges. More learns better, less judges more
    sharply: the variance of y₂ is that of y over 1 − share.
    Returns: the `Adaptation`, with its model on the device of the observation, in evaluation mode and without gradients.
    Raises: DiffinvError for more than one row, or as `Trainer`; UnsupportedError for noise that does not split.
    References: the split is that of Pang et al., *Recorrupted-to-Recorrupted*, CVPR 2021, and, for other noise, of Monroy,
    Bacca & Tachella, 2025, arXiv:2412.04648; losses that adapt to one image: Mohan et al., *Adaptive Denoising via GainTuning*,
    2021, arXiv:2107.12815.
    """
    if observation.batch != 1:
        raise DiffinvError(f"adapt: {observation.batch} measurements; select one row, or train on all of them with a Trainer.")
    data, streams = whole(observation), Rng.for_draws(plan.seed, [0], 1)
    (y, noise), (y2, noise2) = data.noise.split(data.y, streams.spawn(_SPLIT).to(data.y.device), share=share)
    seen, unseen = Observation(y, data.operator, noise), Observation(y2, data.operator, noise2)
    tuned = copy.deepcopy(model).train().requires_grad_(False)
    chosen = parts(tuned)
    if not chosen:
        raise DiffinvError("adapt: nothing to adapt; of this model give other parts, such as `every`.")
    for parameter in chosen:
        parameter.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        tuned = Trainer(tuned, loss, Measured(MeasuredBatch(seen)), plan, Path(folder)).run()
    start = copy.deepcopy(model).eval().requires_grad_(False)
    start, tuned = (m.to(data.y.device) for m in (start, tuned))
    judged = MeasuredBatch(seen, second=unseen)
    before, after = (float(unseen_risk(m, judged)) for m in (start, tuned))
    gain, error = (float(v) for v in compare(start, tuned, judged, streams.spawn(_JUDGE)))
    kept = gain > error
    return Adaptation(tuned if kept else start, before, after, gain, error, kept)


@torch.no_grad()
def unseen_risk(model: nn.Module, batch: MeasuredBatch) -> Tensor:
    """`‖A f(y₁) − y₂‖² − Σ Var(y₂)` a datum: (B,), unbiased for `‖A (f(y₁) − x)‖²` a datum whatever f has learnt from y₁.

    Arguments: batch: y₁ as observation and y₂ as second, of the same operator. A variance that depends on the mean is read at
    y₂, which is right on average where it is linear in the mean (Poisson); elsewhere (Gamma) it shifts all models alike.
    """
    second, good, y2 = _unseen(batch)
    variance = second.noise.variance(y2).where(good, 0.0)
    return mean_good((second.operator(model(batch.data)) - y2) ** 2 - variance, good)


@torch.no_grad()
def compare(start: nn.Module, tuned: nn.Module, batch: MeasuredBatch, rng: Rng) -> tuple[Tensor, Tensor]:
    """The gain of `tuned` over `start` a datum and its standard error, two (B,), in the square of the data's unit.

    Arguments: batch: y₁ as observation and y₂ as second, of the same operator. rng: B streams, of the draws of n₂ whose
    scatter is the error; noise that depends on its mean is drawn at y₂, which is independent of what the models saw.
    """
    second, good, y2 = _unseen(batch)
    first, last = (second.operator(m(batch.data)) for m in (start, tuned))
    gain = mean_good((first - last) * (first + last - 2 * y2), good)
    rng = rng.to(y2.device)
    draws = [mean_good(2 * (first - last) * (second.noise.sample(y2, rng) - y2), good) for _ in range(_DRAWS)]
    return gain, torch.stack(draws).std(0)


def _unseen(batch: MeasuredBatch) -> tuple[Observation, Tensor, Tensor]:
    """The second part, which of its data are good, and these data."""
    return batch.second, good_data(batch.second), clean_data(batch.second)
