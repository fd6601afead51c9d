"""Fixtures that every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tests.contracts.checks")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data: $DIFFINV_DATA, else `shared/data` beside the checkout; the test is skipped without it."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DIFFINV_DATA", beside))
    if not folder.is_dir():
        pytest.skip("needs real data: set DIFFINV_DATA or put shared/data beside the checkout")
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """torch.func.jvp loads torch's own decompositions through its deprecated torch.jit.script: not ours to mend."""
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")
