"""A range of objects as one task of an engine that may run it anywhere, any number of times.

Invariant: what a task leaves behind is what the output directory holds; its answer only says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from diffinv.core.checks import ConfigError
from diffinv.data.catalog import Entry
from diffinv.engine.campaign import Outcome, run_campaign
from diffinv.engine.pool import Recipe
from diffinv.engine.run import Run
from diffinv.engine.shards import Shard
from diffinv.engine.together import DeviceLost
from diffinv.engine.worker import die_with, end_with

_runs: dict[str, Run] = {}  # of this process, by the hash of their configuration: a prior is loaded once


def run_block(recipe: Recipe, config_hash: str, entries: Sequence[Entry], part: Shard, folder: str) -> Outcome:
    """The products of some objects, in this process, which ends with the one that started it.

    Arguments: recipe, config_hash: of the run. entries. part: which of the run's ranges they are. folder: where relative paths
        start.
    Raises: ConfigError if the recipe gives another run here, OSError if the disk refuses.
    """
    if not _runs:
        die_with(os.getppid())
    os.chdir(folder)
    if config_hash not in _runs:
        run = recipe.build()
        if run.config_hash != config_hash:
            raise ConfigError(
                f"prior {recipe.prior}: not the same as where the run began; give all nodes one file and one version."
            )
        _runs[config_hash] = run
    try:
        return run_campaign(_runs[config_hash], entries, part, max_failed=None, supervised=True)
    except DeviceLost as error:
        end_with(error)
