"""What launch/train.py says without a recipe."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from mmrlhf_jax.objectives import OBJECTIVES

PROGRAM = str(Path(__file__).resolve().parents[2] / "launch" / "train.py")


def test_every_objective_is_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [PROGRAM, "--list-objectives"])
    runpy.run_path(PROGRAM, run_name="__main__")
    printed = capsys.readouterr().out
    for name, kind in OBJECTIVES.items():
        assert f"\n{name}  ({kind.__name__})\n    options: " in printed
    assert "tau = 0.05" in printed


def test_a_value_that_its_class_refuses_is_bad_usage(monkeypatch, capsys):
    tiny = str(Path(PROGRAM).parents[1] / "configs" / "tiny.py")
    monkeypatch.setattr(sys, "argv", [PROGRAM, tiny, "--output", "run", "--data.epochs", "-1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(PROGRAM, run_name="__main__")
    assert ended.value.code == 2
    assert "error: data.epochs is -1.0: it must be positive and finite" in capsys.readouterr().err


def test_anything_else_in_place_of_a_recipe_is_bad_usage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [PROGRAM, "--list-objective"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(PROGRAM, run_name="__main__")
    assert ended.value.code == 2
    assert "--list-objectives" in capsys.readouterr().out
