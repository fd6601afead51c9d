"""The file of `--site`: where the tasks of `diffinv sample --engine parsl` run."""

from __future__ import annotations

from typing import Annotated, Literal

from diffinv.config import Count, Field, Section


class SlurmSection(Section):
    """What a job asks for; `walltime` as hours:minutes:seconds, `memory` in GB a node, `options` as further #SBATCH lines."""

    walltime: str
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    memory: Count | None = None
    gpus: Count | None = None
    options: str = ""


class SiteConfig(Section):
    """A site: this machine (`local`), or jobs of `slurm`.

    `workers` processes a node, at most `jobs` jobs of `nodes` nodes at once, `objects` a task; `setup` is shell lines that make
    diffinv available on a node; `address` is this machine's as the nodes see it; a node that is silent for `silence` seconds is
    given up.
    """

    kind: Literal["local", "slurm"]
    workers: Count
    jobs: Count = 1
    nodes: Count = 1
    objects: Count = 50
    setup: str = ""
    address: str | None = None
    silence: Annotated[int, Field(ge=5, le=3600)] = 60
    slurm: SlurmSection | None = None
