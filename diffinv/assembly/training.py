"""`diffinv train`: a reconstructor, or a prior or emulators of spectra where the configuration has their section.

What trains is imported when the configuration has been read, so that a mistake in it is named at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from diffinv.config import Override, has_section, load
from diffinv.core.heap import keep_freed_memory
from diffinv.sections.prior import PriorConfig
from diffinv.sections.train import TrainConfig
from diffinv.sections.unmix import EmulatorConfig


def train(
    path: Path, overrides: Sequence[Override], out: Path, *, resume: bool, new_run: bool, say: Callable[[str], None]
) -> Path:
    """Train what a configuration file describes; returns the path of the result.

    Arguments: path, overrides: of the configuration. out: the folder. resume, new_run: as `learn`; a prior has no new_run, and
    emulators, which take seconds, neither.
    Raises: as `learn`, `learn_prior` and `train_emulators`.
    """
    keep_freed_memory()
    if has_section(path, "components"):
        spectra = load(EmulatorConfig, path, overrides)
        from diffinv.assembly.emulators import train_emulators

        return train_emulators(spectra, out, say)
    if has_section(path, "prior"):
        prior = load(PriorConfig, path, overrides)
        from diffinv.assembly.prior import build_prior_job
        from diffinv.engine.prior import learn_prior

        return learn_prior(build_prior_job(prior, path.parent), out, resume=resume, say=say)
    loaded = load(TrainConfig, path, overrides)
    from diffinv.assembly.job import build_job
    from diffinv.engine.learn import learn

    return learn(build_job(loaded, path.parent), out, resume=resume, new_run=new_run, say=say)
