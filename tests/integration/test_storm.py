"""A small storm of kills; `scripts/bench_batch faults` raises a large one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.small import write_prior
from tests.survey import ROOT, write_objects

sys.path.insert(0, str(ROOT / "scripts"))
from batch_faults import Damage, Storm, start, survey


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path: Path) -> None:
    source, prior = write_objects(tmp_path / "in", *(f"o{k}" for k in range(16))), write_prior(tmp_path / "tiny.safetensors")
    for name in ("storm", "alone"):
        (tmp_path / name).mkdir()
    storm = Storm(source, tmp_path / "storm", prior, workers=2, beside_from=2)
    storm.rage([2, 5, 8, 11], np.random.default_rng(1))
    assert start(source, tmp_path / "storm", prior).wait() == 0
    assert start(source, tmp_path / "alone", prior).wait() == 0
    found = survey(tmp_path / "storm", tmp_path / "alone")
    assert sum(storm.killed.values()) == 4
    assert found == Damage(16, 0, 0, 0, found.attempts, wasted=0, quarantined=0, temporary=0)
    assert found.attempts >= 16
