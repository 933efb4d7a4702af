"""What a loop of rounds says before, or in place of, a stage that could only fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_world import ROOT

from mmrlhf_jax.command import CommandError
from mmrlhf_jax.rounds.loop import Loop
from mmrlhf_jax.rounds.options import Options
from mmrlhf_jax.rounds.prompts import Prompt, read_lines, write_lines
from mmrlhf_jax.stages import Stages
from mmrlhf_jax.training.recipe import read_recipe

RECIPE = str(ROOT / "configs" / "rounds" / "mm_dpo.py")


def loop(directory: Path, **options: object) -> Loop:
    file = directory / "prompts.jsonl"
    write_lines(file, [{"id": "a", "prompt": "Why?"}])
    asked = Options("POLICY", RECIPE, str(directory), prompts=str(file), rounds=1, **options)
    return Loop(asked, read_recipe(RECIPE), Stages(directory, ROOT / "launch"))


def test_media_that_no_prompt_names_and_too_few_prompts_are_told_before_a_model_runs(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--media pictures: no prompt has a picture or video"):
        loop(tmp_path, media="pictures").run()
    with pytest.raises(CommandError, match="1 rounds of 3 prompts need 3, there are 1"):
        loop(tmp_path, prompts_per_round=3).run()
    assert not (tmp_path / "stages").exists()


def test_answers_that_were_all_cut_off_are_an_error_in_training_and_have_no_score_where_held_out(
    tmp_path: Path,
) -> None:
    answers = tmp_path / "answers.jsonl"
    write_lines(answers, [{"id": "a", "responses": [{"text": "Because", "ended": False}, {"text": "", "ended": True}]}])
    prompts = [Prompt("a", "Why?")]
    with pytest.raises(CommandError, match=r"round 1: none of 2 answers can be scored: 1 were cut off at --sampling"):
        loop(tmp_path)._scored(1, "", prompts, answers)
    assert read_lines(loop(tmp_path)._scored(0, "held_out_", prompts, answers)) == []
