"""What `diffinv sample` does with every object, and who does it: this process, several of this machine, or a site's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffinv.config import Loaded, load
from diffinv.core.checks import ConfigError
from diffinv.data.catalog import Entry
from diffinv.data.layouts import InputOptions
from diffinv.engine.calibration import Calibration
from diffinv.engine.campaign import Outcome, run_campaign
from diffinv.engine.channels import check_mixing
from diffinv.engine.draws import Method
from diffinv.engine.inspect import foresee_run
from diffinv.engine.methods import Choice, build_method
from diffinv.engine.pool import Recipe, run_pool
from diffinv.engine.run import Plan, Run
from diffinv.engine.shards import Shard
from diffinv.priors.store import Prior
from diffinv.sections.sample import SampleConfig
from diffinv.sections.site import SiteConfig

if TYPE_CHECKING:
    from diffinv.engine.sites import Site


def input_options(config: SampleConfig) -> InputOptions:
    """How files are read."""
    given = {name: getattr(config.input, name) for name in type(config.input).model_fields}
    noise = given.pop("noise_std")
    return InputOptions(**given, noise_std=noise[0] if noise is not None and len(noise) == 1 else noise)


def sampling_method(loaded: Loaded[SampleConfig], prior: Prior) -> Method:
    """How draws are made.

    Raises: ConfigError, with the place in the file, if there is no such method, or not with this prior and these bands.
    """
    check_mixing(loaded.config.input.mixing or {}, prior.card)
    sampler, guidance = loaded.config.sampler, loaded.config.sampler.guidance
    choice = Choice(sampler.name, sampler.steps, guidance.name, guidance.iterations, guidance.tol)
    return build_method(choice, prior.card, where=loaded.where)


def make_plan(
    loaded: Loaded[SampleConfig], prior: Prior, crew: Crew, *, calibration: Calibration | None, pack: int | None
) -> Plan:
    """How every object is treated. calibration, pack: as of `Plan`."""
    config = loaded.config
    return Plan(
        options=input_options(config),
        method=sampling_method(loaded, prior),
        draws=config.sampler.samples,
        seed=config.sampler.seed,
        target_fwhm=config.output.target_psf,
        margin=config.output.margin,
        save_samples=config.output.samples,
        max_batch=config.sampler.max_batch,
        identity=config.identity(),
        held_out=config.sampler.held_out,
        calibration=calibration,
        processes=crew.processes,
        pack=pack,
        objects=config.sampler.objects,
    )


@dataclass(frozen=True)
class Crew:
    """workers: processes of this machine, None for this one alone. timeout: seconds an object, or None. site: or None."""

    workers: int | None
    timeout: float | None
    site: Site | None

    @property
    def alone(self) -> bool:
        """Whether this process computes."""
        return self.workers is None and self.site is None

    @property
    def processes(self) -> int:
        """How many share a machine's memory."""
        return self.site.workers if self.site is not None else self.workers or 1


def choose_crew(engine: str, site: Path | None, workers: int | None, timeout: float | None) -> Crew:
    """The crew that the options of the command line ask for.

    Raises: ConfigError if they contradict each other, or the site's file is wrong.
    """
    if engine == "local":
        if site is not None:
            raise ConfigError("--site: it is for --engine parsl; without it, --workers says how many processes there are.")
        return Crew(workers or (None if timeout is None else 1), timeout, None)
    if site is None:
        raise ConfigError("--engine parsl: give --site FILE, which says where; configs/sites has examples.")
    if workers is not None or timeout is not None:
        raise ConfigError("--engine parsl: takes neither --workers nor --timeout; the site's file has `workers`.")
    return Crew(None, None, read_site(site))


def read_site(path: Path) -> Site:
    """The site of a file.

    Raises: ConfigError if the file is wrong, or Parsl is not installed.
    """
    config = load(SiteConfig, path).config
    if (config.kind == "slurm") != (config.slurm is not None):
        raise ConfigError(f"{path}: a site of kind slurm needs a section `slurm`, another has none.")
    try:
        from diffinv.engine.sites import Site, Slurm
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "parsl":
            raise
        raise ConfigError("--engine parsl: Parsl is not installed; pip install 'diffinv[parsl]'.") from error
    given = {name: getattr(config, name) for name in SiteConfig.model_fields if name not in ("kind", "slurm")}
    return Site(**given, slurm=None if config.slurm is None else Slurm(**config.slurm.model_dump()))


def execute(crew: Crew, run: Run, recipe: Recipe, entries: Sequence[Entry], shard: Shard, *, max_failed: float) -> Outcome:
    """A product for every object of the shard that can have one; of a packed one the path goes on within its pack.

    Arguments: run, recipe: of one run. max_failed: share of the shard's objects that may fail before the run stops.
    Raises: OSError if the disk refuses, ConfigError if no process can start.
    """
    if crew.site is not None:
        from diffinv.engine.sites import run_site

        outcome = run_site(run, recipe, entries, crew.site, max_failed=max_failed)
    elif crew.workers is None:
        outcome = run_campaign(run, entries, shard, max_failed=max_failed)
    else:
        outcome = run_pool(run, recipe, entries, shard, workers=crew.workers, timeout=crew.timeout, max_failed=max_failed)
    outcome.products = [Path(str(run.packs.find(path) or path)) for path in outcome.products]
    return outcome


def print_plan(run: Run, entries: Sequence[Entry], crew: Crew) -> None:
    """What there is to do, an object a line, and what it would cost at most, on stderr."""
    states = [run.state(entry) for entry in entries]
    for entry, state in zip(entries, states):
        print(f"{entry.object_id}\t{entry.path}\t{state}")
    waiting = [entry for entry, state in zip(entries, states) if state == "to do"]
    print(f"diffinv: {foresee_run(run, waiting, crew.processes) if waiting else 'nothing to do'}", file=sys.stderr)
