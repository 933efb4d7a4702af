"""Mutated MODEL and RUN directories are read or refused: see tests/fuzz_models/run.py for the long form.

The seeds are fixed, and so is the number of cases: what CI says must not depend on luck. Other seeds are for by hand.
"""

from __future__ import annotations

import pytest
from fuzz_models.harness import fuzz
from fuzz_models.readers import READERS


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_directory_is_read_or_refused(name: str) -> None:
    figures = fuzz(READERS[name], 25, seed=1)
    assert figures.executions == 25
    assert not figures.failures


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_hundreds_of_mutated_directories_are_refused_by_name(name: str) -> None:
    figures = fuzz(READERS[name], 600, seed=2)
    assert figures.executions == 600
    assert not figures.failures
