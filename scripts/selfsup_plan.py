"""How every network of the self-supervised benchmark is trained."""

from __future__ import annotations

from diffinv.training.plan import TrainingPlan

TRAINING, HELD_OUT, SURVEY_SEED, BATCH, RATE = 8192, 256, 4200, 32, 1e-3


def plan_of(steps: int, seed: int, rate: float | None) -> TrainingPlan:
    """rate: of the multipliers, or None."""
    return TrainingPlan(
        steps,
        BATCH,
        RATE,
        warmup=50,
        ema_decay=0.99,
        seed=seed,
        multiplier_rate=rate,
        multiplier_momentum=0.0,
        save_every=steps,
        log_every=50,
    )
