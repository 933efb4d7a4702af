"""Pairs across questions about one picture."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import runpy
from pathlib import Path
from random import Random
from typing import Any

import pytest
from data_samples import picture, write_media, write_rows

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.data.audit import audit
from mmrlhf_jax.data.cross_prompt import MOST, Crossing, CrossPromptError, cross_prompts, fits, merge
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.pipeline import Selection, select
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.ranking import by_score
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.data.write_back import WriteBackError, write_back
from mmrlhf_jax.groups import Group, Lengths, Media, Origin, Pair, Response, Turn
from mmrlhf_jax.inference.prompts import dataset_prompts
from mmrlhf_jax.training.held_out import held_out_rows

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "prepare.py"
ONE, OTHER = (Media("image", name, ((4, 4),), name * 32) for name in ("a1", "b2"))


def asked(name: str, question: str, *scores: float | None, media: tuple[Media, ...] = (ONE,)) -> Group:
    responses = [Response(f"{question} {i}", score=score, reason=f"{name}{i}") for i, score in enumerate(scores)]
    pairs: tuple[Pair, ...] = ()
    if None not in scores:
        responses, pairs = by_score(responses)
    return Group(name, (Turn("user", question),), media, tuple(responses), pairs, (Origin(f"{name}.jsonl", 1),))


def compared(group: Group) -> set[tuple[Any, Any]]:
    def named(k: int) -> tuple[str | None, str]:
        return group.responses[k].question, group.responses[k].text

    return {(named(pair.chosen), named(pair.rejected)) for pair in group.pairs}


def split(group: Group) -> tuple[set[Any], set[Any]]:
    """Pairs within questions, and across."""
    pairs = compared(group)
    return {p for p in pairs if p[0][0] == p[1][0]}, {p for p in pairs if p[0][0] != p[1][0]}


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_pairs_across_are_the_better_s_by_score_and_so_many_a_question(gap: float) -> None:
    rng = Random(0)
    for _ in range(100):
        groups = [
            asked(f"g{i}", f"Q{i}?", *(rng.randrange(6) / 2 for _ in range(rng.randrange(1, 5))))
            for i in range(rng.randrange(2, 5))
        ]
        count = rng.randrange(1, 9)
        crossed = merge(groups, Crossing(count, gap, seed=1))
        score = {(r.question, r.text): r.score for r in crossed.responses}
        everyone = [(g.prompt[0].text, r.text) for g in groups for r in g.responses]
        assert sorted((r.question, r.text) for r in crossed.responses) == sorted(everyone)
        within, across = split(crossed)
        assert within == {
            ((g.prompt[0].text, g.responses[p.chosen].text), (g.prompt[0].text, g.responses[p.rejected].text))
            for g in groups
            for p in g.pairs
        }
        apart = {(b, w) for b in score for w in score if b[0] != w[0] and score[b] - score[w] >= max(gap, 0.25)}
        assert across <= apart
        for group in groups:  # of each question so many, or all there are
            candidates = {p for p in apart if group.prompt[0].text in (p[0][0], p[1][0])}
            of_it = {p for p in across if group.prompt[0].text in (p[0][0], p[1][0])}
            assert len(of_it) >= min(count, len(candidates))
        assert len(across) <= count * len(groups)
        assert [r.score for r in crossed.responses] == sorted((r.score for r in crossed.responses), reverse=True)


def test_what_a_merged_group_holds() -> None:
    groups = [asked("a", "One?", 3.0, 1.0), asked("b", "Two?", 2.0)]
    crossed = merge(groups, Crossing(9))
    assert (crossed.id, crossed.media) == ("a+1", (ONE,))
    assert [(r.question, r.text, r.rank, r.reason) for r in crossed.responses] == [
        ("One?", "One? 0", 0, "a0"),
        ("Two?", "Two? 0", 1, "b0"),
        ("One?", "One? 1", 2, "a1"),
    ]
    assert crossed.pairs == (Pair(0, 1), Pair(0, 2), Pair(1, 2))
    assert [crossed.margin(pair) for pair in crossed.pairs] == [1.0, 2.0, 1.0]
    assert [str(origin) for origin in crossed.origins] == ["a.jsonl:1", "b.jsonl:1"]
    assert [crossed.asked(r)[-1].text for r in crossed.responses] == ["One?", "Two?", "One?"]
    assert not crossed.one_prompt


def test_what_is_drawn_hangs_on_the_seed_and_not_on_the_order() -> None:
    groups = [asked(f"g{i}", f"Q{i}?", *range(i, i + 4)) for i in range(3)]
    found = compared(merge(groups, Crossing(2)))
    assert compared(merge(groups[::-1], Crossing(2))) == found
    assert compared(merge(groups, Crossing(2, seed=1))) != found
    assert compared(merge(groups, Crossing(5))) > found


def test_only_questions_about_the_same_pictures_meet() -> None:
    several = (ONE, OTHER)
    groups = [
        asked("a", "One?", 3.0, 1.0),
        asked("b", "One?", 3.0, 1.0, media=(OTHER,)),
        asked("c", "Two?", 2.0),
        asked("d", "One?", 9.0),  # the question of a, by another
        asked("e", "Two?", 5.0, media=()),
        asked("f", "Three?", 2.0, None),
        asked("g", "Four?", 5.0, media=several),
        asked("h", "Five?", 1.0, media=several[::-1]),
    ]
    kept, line = cross_prompts(groups, Crossing(9))
    assert [group.id for group in kept] == ["a+1", "b", "d", "e", "f", "g", "h"]
    assert [*kept[1:]] == [group for group in groups if group.id not in "ac"]
    assert line == (
        "--cross-prompt 9: 2 groups about the same pictures are 1 now, with 2 pairs across questions; 1 with pictures "
        "could not be, for want of scores that agree with their pairs"
    )


def test_earlier_turns_and_places_of_media_must_agree() -> None:
    def after(group: Group, *turns: Turn) -> Group:
        return dataclasses.replace(group, prompt=(*turns, *group.prompt))

    groups = [
        after(asked("a", "One?", 3.0), Turn("system", "Be brief.")),
        asked("b", "Two?", 2.0),
        after(asked("c", "Three?", 1.0), Turn("user", "Hm?", 1), Turn("assistant", "Yes.")),
        dataclasses.replace(asked("d", "Four?", 0.0), prompt=(Turn("user", "Hm?"), Turn("user", "Four?", 1))),
    ]
    with pytest.raises(CrossPromptError, match="no two groups ask different questions about the same pictures"):
        cross_prompts(groups, Crossing(9))
    kept, _ = cross_prompts([*groups, after(asked("e", "Five?", 1.0), Turn("system", "Be brief."))], Crossing(9))
    assert [group.id for group in kept] == ["a+1", "b", "c", "d"]
    assert kept[0].asked(kept[0].responses[1]) == (Turn("system", "Be brief."), Turn("user", "Five?"))


def test_groups_whose_pairs_and_scores_disagree_do_not_fit() -> None:
    good = asked("a", "One?", 3.0, 1.0)
    assert fits(good)
    assert not fits(dataclasses.replace(good, pairs=(Pair(1, 0),)))
    assert not fits(dataclasses.replace(good, pairs=(Pair(0, 1, 0.5),)))  # a margin of its own is not its scores'
    assert not fits(asked("b", "Two?", 2.0, None))
    assert not fits(asked("c", "Three?", 2.0, media=()))
    assert not fits(merge([good, asked("d", "Four?", 2.0)], Crossing(1)))


def test_a_merged_group_has_a_bound() -> None:
    groups = [asked(f"g{i}", f"Q{i}?", *range(5)) for i in range(8)] + [asked("last", "Last?", *range(MOST))]
    kept, _ = cross_prompts(groups, Crossing(2))
    assert [(group.id, len(group.responses)) for group in kept] == [
        ("g0+2", 15),
        ("g3+2", 15),
        ("g6+1", 10),
        ("last", MOST),
    ]


def test_the_json_of_a_group_and_its_hash() -> None:
    plain = asked("a", "One?", 3.0, 1.0)
    assert '"question"' not in plain.to_json()  # stored as before it existed
    crossed = merge([plain, asked("b", "Two?", 2.0)], Crossing(9))
    assert Group.from_json(crossed.to_json()) == crossed
    other = dataclasses.replace(crossed, responses=(dataclasses.replace(crossed.responses[0], question="Who?"),) * 3)
    assert len({group.content_hash() for group in (plain, crossed, other)}) == 3


def test_question_by_question_it_is_the_groups_it_was_made_of() -> None:
    groups = [asked("a", "One?", 3.0, 1.0, 2.0), asked("b", "Two?", 2.0), asked("c", "Three?", 1.0, 1.0)]
    crossed = merge(groups, Crossing(9))
    back = {group.prompt[-1].text: group for group in crossed.by_question()}
    assert len(back) == 3
    for group in groups:
        own = back[group.prompt[-1].text]
        assert own.one_prompt
        assert [(r.text, r.score) for r in own.responses] == [(r.text, r.score) for r in group.responses]
        assert own.pairs == group.pairs
    assert groups[0].by_question() == (groups[0],)


def test_facts_and_ties_are_kept() -> None:
    """Facts are about the picture: what is said of it differs, so do the groups."""
    ones = [
        dataclasses.replace(asked(name, f"{name}?", 1.0, 1.0, 0.5), facts=("A cat.",), ties=((0, 1),)) for name in "ab"
    ]
    crossed, _ = cross_prompts(ones, Crossing(9))
    assert crossed[0].facts == ("A cat.",)
    assert [group.ties for group in crossed[0].by_question()] == [((0, 1),)] * 2
    other = dataclasses.replace(ones[1], facts=("A dog.",))
    with pytest.raises(CrossPromptError):
        cross_prompts([ones[0], other], Crossing(9))


def test_a_question_that_stands_in_two_groups_stands_on_one_side_of_a_held_out_split() -> None:
    """ "Two?" is part of a merged group and a group of its own."""
    split_by = 0
    for number in range(20):
        media = tuple(Media("image", f"{number}{k}", ((4, 4),), f"{number}{k}" * 16) for k in range(2))
        groups = [asked(f"{k}{name}", name, 2.0, 1.0, media=(media[k],)) for k in range(2) for name in ("One?", "Two?")]
        kept, _ = cross_prompts(
            [*groups, *(asked(f"x{k}", "Two?", 9.0, media=(media[k],)) for k in range(2))], Crossing(1)
        )
        assert len(kept) == 4
        with contextlib.suppress(ValueError):  # all on one side
            aside = held_out_rows(kept, 0.5, number)
            assert {kept[row].media for row in aside}.isdisjoint(kept[row].media for row in {*range(4)} - {*aside})
            split_by += 1
    assert split_by > 3


def test_the_audit_looks_at_pairs_within_questions_alone() -> None:
    groups = [asked("a", "One?", 3.0, 1.0), asked("b", "Two?", 2.0, 5.0)]
    yes = [Response("Yes.", score=score) for score in (3.0, 5.0)]
    same = [dataclasses.replace(group, responses=(r,), pairs=()) for group, r in zip(groups, yes, strict=True)]
    crossed = merge(same, Crossing(9))
    assert len(crossed.pairs) == 1  # "Yes." to one question is better than "Yes." to the other
    found = audit([crossed])
    assert (found.groups, found.pairs, found.alike.count) == (2, 0, 0)
    assert audit([merge(groups, Crossing(9))]) == audit(groups)


def test_fine_tuning_on_the_best_takes_the_best_of_each_question() -> None:
    crossed = merge([asked("a", "One?", 3.0, 1.0), asked("b", "Two?", 2.0, 0.0)], Crossing(9))
    lengths = [Lengths(1, 9, (3,) * 4)]
    (item,) = select([crossed], lengths, Selection(preferences=False, kept="best")).items
    assert [crossed.responses[k].text for k in item.responses] == ["One? 0", "Two? 0"]


SCORED = {"prompt": "q", "responses": "a", "score": "s", "image": "pic", "id": "id"}


@pytest.fixture
def crossed(tmp_path: Path) -> Any:
    """A dataset: two questions about one picture under two names, and one about another."""
    root = write_media(tmp_path / "media", a=picture(), copy=picture(), b=picture(size=(7, 9)))
    rows = [
        {"id": "x", "q": "One?", "a": ["x", "y"], "s": [1, 3], "pic": "a.png"},
        {"id": "z", "q": "Three?", "a": ["x", "y"], "s": [1, 3], "pic": "b.png"},
        {"id": "y", "q": "Two?", "a": ["x", "z"], "s": [2, 2], "pic": "copy.png"},
    ]
    file = write_rows(tmp_path / "in.jsonl", rows)
    options = PrepareOptions(
        "mapped", (file,), str(tmp_path / "out"), media=str(root), source_options=SourceOptions(SCORED)
    )
    return dataclasses.replace(options, crossing=Crossing(9))


def test_a_dataset_with_pairs_across_prompts(crossed: Any, tmp_path: Path) -> None:
    report = prepare(crossed)
    dataset = open_dataset(crossed.output)
    first, second = (dataset.with_media(row) for row in range(2))
    assert (first.id, second.id) == ("x+1", "z")
    assert [(r.question, r.text) for r in first.responses] == [
        ("One?", "y"),
        ("Two?", "x"),
        ("Two?", "z"),
        ("One?", "x"),
    ]
    assert [(p.chosen, p.rejected) for p in first.pairs] == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert first.media[0].encoded == (picture(),)
    assert (report.rows, report.groups, report.pairs) == (3, 2, 6)
    assert report.stages[0].startswith("--cross-prompt 9: 2 groups about the same pictures are 1 now, with 4 pairs")
    assert prepare(crossed).reused
    with pytest.raises(ValueError, match="different: crossing"):
        prepare(dataclasses.replace(crossed, crossing=Crossing(9, seed=1)))


def test_who_would_misread_such_a_dataset_refuses_it(crossed: Any, tmp_path: Path) -> None:
    prepare(crossed)
    dataset = open_dataset(crossed.output)
    for form in ("trl", "sharegpt"):
        with pytest.raises(WriteBackError, match=r"1 groups have what(.|\n)*answers to several questions"):
            write_back(dataset, form, str(tmp_path / "rows"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row 0 holds answers to several questions: prepare without --cross-prompt"):
        dataset_prompts(dataset)


REFUSED = {
    "no scores": ({"source": "trl", "cross_prompt": 2}, "--cross-prompt needs scores"),
    "no scores mapped": (
        {"source": "mapped", "map": ("prompt=q", "responses=a"), "cross_prompt": 2},
        "--cross-prompt needs scores",
    ),
    "the best only": ({"cross_prompt": 2, "pairs": "best_worst"}, "--cross-prompt adds pairs that --pairs best_worst"),
    "none": ({"cross_prompt": 0}, "--cross-prompt 0 is not positive"),
    "a negative seed": ({"cross_prompt": 1, "seed": -1}, "--seed -1 is negative"),
}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_options_without_a_use_are_refused(arguments: dict[str, Any], said: str) -> None:
    program = runpy.run_path(str(LAUNCH))
    base = {"source": "vlfeedback", "input": ("in.jsonl",), "output": "out"}
    with pytest.raises(UsageError, match=re.escape(said)):
        program["_options"](program["Arguments"](**{**base, **arguments}))


def test_the_program_s_options_arrive() -> None:
    program = runpy.run_path(str(LAUNCH))
    base = {"source": "vlfeedback", "input": ("in.jsonl",), "output": "out"}
    made = program["_options"](program["Arguments"](**base, cross_prompt=3, gap=0.5, seed=7))
    assert made.crossing == Crossing(3, 0.5, 7)
