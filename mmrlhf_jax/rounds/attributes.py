"""Where an answer's attributes come from: the truth about a board, the user's own program, stored reward scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrlhf_jax.command import CommandError
from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.digit_boards import measures
from mmrlhf_jax.data.digit_boards.world import scene_of
from mmrlhf_jax.data.rewards import REWARD, made_by, read_rewards
from mmrlhf_jax.rounds.candidates import Candidates
from mmrlhf_jax.rounds.prompts import read_lines
from mmrlhf_jax.rounds.scoring import CLAIMS, SUPPORTED

WRONG = "wrong"
OF_WORLD = (SUPPORTED, CLAIMS, WRONG)
Known = list[tuple[dict[str, float], ...]]  # of each prompt, of each of its answers


def of_world(candidates: Sequence[Candidates], truth: Mapping[str, dict[str, Any]]) -> Known:
    """`supported` and `claims`: an answer's claims that are true, and all it makes; `wrong`: those that are not, or are
    missing. `truth` are the lines of the world by id."""
    return [tuple(_counted(truth[each.prompt.id], text) for text in each.texts) for each in candidates]


def _counted(row: dict[str, Any], text: str) -> dict[str, float]:
    question = row["question"]
    wrong, total = measures.wrong_claims(scene_of(row), question, text)
    made = len(measures.claims(question, text))
    return {SUPPORTED: float(total - wrong), CLAIMS: float(made), WRONG: float(wrong)}


def of_rewards(candidates: Sequence[Candidates], dataset: Path, model: str, name: str) -> Known:
    """`name`: the score that launch/annotate.py stored for `model`, an absolute MODEL, beside the candidates."""
    prepared = PreparedDataset(str(dataset))
    (store,) = [store for store in find(prepared.path, REWARD) if made_by(store).get("model") == model]
    rewards = read_rewards(store, prepared)
    scores = {
        (group.id, response.text): score
        for row, group in enumerate(prepared.groups())
        for response, score in zip(group.responses, rewards[row].score, strict=True)
    }
    return [tuple({name: scores[each.prompt.id, text]} for text in each.texts) for each in candidates]


def of_program(candidates: Sequence[Candidates], file: Path) -> Known:
    """What a user's program wrote of the candidates: of each line a list `attributes`, an object of numbers for each of
    its `responses`, in order. Raises CommandError naming the line that is not so."""
    try:
        lines = read_lines(file)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{file} is no JSON lines: {error}") from error
    if len(lines) != len(candidates):
        raise CommandError(f"{file} has {len(lines)} lines for the {len(candidates)} of the candidates: one for each")
    known: Known = []
    for number, (line, each) in enumerate(zip(lines, candidates, strict=True), 1):
        found = line.get("attributes") if isinstance(line, dict) else None
        if not isinstance(found, list) or len(found) != len(each.texts) or not all(map(_are_numbers, found)):
            raise CommandError(
                f"{file}:{number}: 'attributes' must be a list of {len(each.texts)} objects of finite numbers, one for "
                "each response"
            )
        known.append(tuple({name: float(value) for name, value in one.items()} for one in found))
    return known


def _are_numbers(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in found.values()
    )
