"""What is doubtful about a preference set whose rows are all well-formed.

Reading turns away what is wrong beyond doubt (identical answers, empty ones, duplicates, contradictions under one id);
the audit counts what is left and may be meant: preferences between texts that differ in form alone, answers without a
word, the same question under several ids, preferences repeated or swapped between these, and how far the longer answer
wins. It changes nothing. The idea is that of "The elephant in the room" (https://arxiv.org/abs/2409.19024); its own
taxonomy is not public, this one is ours.

Length is counted in characters. `longer` is the share of pairs whose preferred answer is longer, `longer_all` the share
of groups in which it is so in every pair: what a reward model scores that only looks at lengths (ACC and ACC+). The
p-value is that of the two-sided sign test over pairs of different length, by the normal approximation with continuity;
pairs of one group share answers, so it is too small where groups are large.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmrlhf_jax.command import one_line
from mmrlhf_jax.data.sources.rows import Rejected
from mmrlhf_jax.groups import Group

SHOWN = 5  # ids of each kind


@dataclass(frozen=True, slots=True)
class Finding:
    """How many, and the ids of the first groups that are meant."""

    count: int
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """Of kept groups, but for `rejected`: reason -> rows, of those that were turned away (duplicates under that word).

    alike       pairs whose two texts are one but for case, spaces and punctuation
    wordless    answers in pairs that hold no letter or digit
    asked_again groups whose prompt and media are those of an earlier group
    repeated    preferences that an earlier group states of the same question and texts
    swapped     preferences whose opposite an earlier group states
    longer      share of pairs in which the preferred is longer; None without any
    longer_all  share of groups with pairs in which it is longer in all of them
    length_p    how likely at least so uneven a split is by chance
    preferred_characters, other_characters   mean lengths over pairs
    """

    groups: int
    pairs: int
    alike: Finding
    wordless: Finding
    asked_again: Finding
    repeated: Finding
    swapped: Finding
    longer: float | None
    longer_all: float | None
    length_p: float
    preferred_characters: float | None
    other_characters: float | None
    rejected: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """For a terminal."""
        found = {
            "alike": "pairs differ in case, spaces or punctuation alone",
            "wordless": "answers in pairs hold no letter or digit",
            "asked_again": "groups ask what an earlier one asks",
            "repeated": "preferences repeat an earlier group's",
            "swapped": "preferences are the opposite of an earlier group's",
        }
        lines = [f"audit of {self.groups} groups, {self.pairs} pairs"]
        for name, said in found.items():
            finding: Finding = getattr(self, name)
            where = f" ({', '.join(one_line(one)[:40] for one in finding.ids)})" if finding.ids else ""
            lines.append(f"  {finding.count} {said}{where}")
        if self.longer is not None:
            lines.append(
                f"  the preferred answer is the longer one in {self.longer:.3f} of pairs (p = {self.length_p:.2g}), in "
                f"all pairs of {self.longer_all or 0:.3f} of groups; mean characters {self.preferred_characters:.0f} "
                f"and {self.other_characters:.0f}"
            )
        return lines


def audit(groups: Iterable[Group], rejected: Sequence[Rejected] = ()) -> Audit:
    """Looks at every group once, in order; holds a short key of each pair, no text. A group whose responses answer
    several questions is one for each of them here, and pairs across these are not looked at."""
    wordless: list[str] = []
    alike: list[str] = []
    again: list[str] = []
    stated: dict[Any, set[tuple[int, int]]] = defaultdict(set)
    repeated: list[str] = []
    swapped: list[str] = []
    lengths: list[tuple[int, int]] = []
    longer_in_all: list[bool] = []
    count = 0
    for group in itertools.chain.from_iterable(map(Group.by_question, groups)):
        count += 1
        question = _question(group)
        if question in stated:
            again.append(group.id)
        mine = stated[question]
        earlier = set(mine)
        named = {index for pair in group.pairs for index in (pair.chosen, pair.rejected)}
        wordless += [group.id for index in sorted(named) if not _plain(group.responses[index].text)]
        for better, worse in _texts(group):
            alike += [group.id] * (_plain(better) == _plain(worse))
            key = hash(better), hash(worse)
            repeated += [group.id] * (key in earlier)
            swapped += [group.id] * (key[::-1] in earlier)
            mine.add(key)
        own = [(len(better), len(worse)) for better, worse in _texts(group)]
        lengths += own
        longer_in_all += [all(better > worse for better, worse in own)] if own else []
    return Audit(
        groups=count,
        pairs=len(lengths),
        alike=_finding(alike),
        wordless=_finding(wordless),
        asked_again=_finding(again),
        repeated=_finding(repeated),
        swapped=_finding(swapped),
        **_lengths(lengths, longer_in_all),
        rejected=dict(Counter("duplicate" if row.duplicate else row.reason for row in rejected).most_common()),
    )


def _question(group: Group) -> Any:
    """Equal for groups that ask the same about the same media, whoever reads them."""
    media = tuple((each.kind, each.sha256 or each.path) for each in group.media)
    return hash((tuple((turn.role, turn.text) for turn in group.prompt), media, group.media_before()))


def _texts(group: Group) -> Iterator[tuple[str, str]]:
    for pair in group.pairs:
        yield group.responses[pair.chosen].text, group.responses[pair.rejected].text


def _plain(text: str) -> str:
    return "".join(sign for sign in text.casefold() if sign.isalnum())


def _finding(ids: Sequence[str]) -> Finding:
    return Finding(len(ids), tuple(dict.fromkeys(ids))[:SHOWN])


def _lengths(lengths: Sequence[tuple[int, int]], longer_in_all: Sequence[bool]) -> dict[str, Any]:
    longer = sum(better > worse for better, worse in lengths)
    uneven = sum(better != worse for better, worse in lengths)
    return {
        "longer": longer / len(lengths) if lengths else None,
        "longer_all": sum(longer_in_all) / len(longer_in_all) if longer_in_all else None,
        "length_p": sign_test(longer, uneven),
        "preferred_characters": sum(better for better, _ in lengths) / len(lengths) if lengths else None,
        "other_characters": sum(worse for _, worse in lengths) / len(lengths) if lengths else None,
    }


def sign_test(successes: int, trials: int) -> float:
    """How likely a fair coin is at least so far from even, two-sided; 1 without trials."""
    if not trials:
        return 1.0
    far = max(0.0, abs(successes - trials / 2) - 0.5) / math.sqrt(trials / 4)
    return math.erfc(far / math.sqrt(2))
