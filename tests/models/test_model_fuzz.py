"""Mutated MODEL and RUN directories are read or refused: see tests/fuzz_models/run.py for the long form."""

from __future__ import annotations

import pytest
from fuzz_models.harness import fuzz
from fuzz_models.readers import READERS


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_directory_is_read_or_refused(name: str) -> None:
    figures = fuzz(READERS[name], 200, seed=1, seconds=0.8)
    assert figures.executions
    assert not figures.failures


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_thousand_mutated_directories_are_refused_by_name(name: str) -> None:
    figures = fuzz(READERS[name], 1_000, seed=2, seconds=20)
    assert not figures.failures
