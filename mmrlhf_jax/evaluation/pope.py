"""POPE: is this object in the picture? Yes-or-no questions, half of them about objects that are not there.

Source: https://arxiv.org/abs/2305.10355, repository RUCAIBox/POPE. A row: `question_id`, `image`, `text` and `label` as
its files have them (coco_pope_random.json, ..._popular.json, ..._adversarial.json), or `question`, `answer` and
`category` as lmms-lab/POPE has them. The category is the column's, else the one the file's name tells.

An answer is read as the released script reads it (`said`), with its quirks: only what stands before the first full
stop counts; commas are dropped; it is split at single spaces; `No`, `no` or `not` among these words makes it a no, and
everything else is a yes: an empty answer too, and `NO`, `"no"`, `no!`, or a no that only a line break parts from the
next word. `unclear` counts answers without any yes, no or not (however spelled), all of which the rule calls yes.

Figures: accuracy; precision, recall and F1 of yes; the share of yes answers. None (-) where there is nothing to divide
by, where the script would fail.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmrlhf_jax.data.sources.pictures import Store
from mmrlhf_jax.data.sources.rows import Row, RowError, prompt_of, text_of
from mmrlhf_jax.evaluation.judges import Reply
from mmrlhf_jax.evaluation.questions import (
    Answer,
    AnswerBenchmark,
    Question,
    Record,
    by_category,
    column_of,
    name_of,
    picture_named,
    share,
)

CATEGORIES = ("adversarial", "popular", "random")
_CLEAR = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)


def check(row: Row, store: Store) -> Question:
    media = (picture_named(column_of(row, "image"), "'image'", store),)
    label = text_of(column_of(row, "label", "answer"), "'label'").strip().lower()
    if label not in ("yes", "no"):
        raise RowError(f"'label' is {label[:80]!r}, yes or no was expected")
    category = _category(row)
    name = name_of(row)
    return Question(
        origin=row.origin,
        # the three files count alike
        id=f"{category}-{name}" if category in CATEGORIES else name,
        category=category,
        prompt=prompt_of(column_of(row, "text", "question"), media),
        media=media,
        facts={"label": label, "name": name},
    )


def _category(row: Row) -> str:
    if row.fields.get("category") is not None:
        return text_of(row.fields["category"], "'category'")
    file = row.origin.file.replace("\\", "/").rsplit("/", 1)[-1]
    return next((name for name in CATEGORIES if name in file), "pope")


def said(answer: str) -> str:
    """yes or no, as the released script reads an answer."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def verdict(question: Question, answers: Sequence[Answer], _: Sequence[Reply]) -> Record:
    text = answers[0].text
    return {"label": question.facts["label"], "said": said(text), "unclear": _CLEAR.search(text) is None}


def figures(records: Sequence[Record]) -> Mapping[str, Any]:
    pairs = [(record["said"], record["label"]) for record in records]
    hit = pairs.count(("yes", "yes"))
    precision = share(hit, sum(answer == "yes" for answer, _ in pairs))
    recall = share(hit, sum(label == "yes" for _, label in pairs))
    f1 = None
    if precision is not None and recall is not None and precision + recall:
        f1 = 2 * precision * recall / (precision + recall)
    return {
        "unclear": sum(record["unclear"] for record in records),
        "accuracy": share(sum(answer == label for answer, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_rate": share(sum(answer == "yes" for answer, _ in pairs), len(pairs)),
    }


def measure(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    return by_category(records, figures)


BENCHMARK = AnswerBenchmark(
    name="pope",
    title="POPE",
    counts=("rows", "unclear"),
    metrics={
        "accuracy": "accuracy",
        "precision": "precision",
        "recall": "recall",
        "f1": "F1",
        "yes_rate": "yes rate",
        "reward": "reward",
    },
    check=check,
    verdict=verdict,
    measure=measure,
)
