"""Which groups become rows, and what is lost of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mmrlhf_jax.command import one_line
from mmrlhf_jax.data.datasets import Dataset
from mmrlhf_jax.groups import Group

SHOWN = 3  # groups named in a refusal
VIDEO = "a video, which is stored as frames: leave such groups out with --skip-videos"
CROSSED = "answers to several questions, which no pair of rows compares: prepare without --cross-prompt"


class WriteBackError(ValueError):
    """Nothing was written; the message says why."""


@dataclass(slots=True)
class Chosen:
    """The rows of a dataset that are written, and counts of what is not.

    margins   whether every pair has a margin, so that rows can have a column of them
    media     whether any group has pictures
    """

    rows: list[int] = field(default_factory=list)
    pairs: int = 0
    margins: bool = True
    media: bool = False
    without_pairs: int = 0
    with_videos: int = 0
    unpaired: int = 0
    reasons: int = 0
    bare_margins: int = 0

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [f"{self.pairs} pairs of {len(self.rows)} groups"]
        left_out = [
            (self.without_pairs, "groups without pairs"),
            (self.with_videos, "groups with videos"),
            (self.unpaired, "responses in no pair"),
            (self.reasons, "reasons"),
            (self.bare_margins, "margins, since other pairs have none"),
        ]
        lines += [f"not written: {count} {what}" for count, what in left_out if count]
        return lines


@dataclass(frozen=True, slots=True)
class PairTexts:
    """One pair of a group."""

    chosen: str
    rejected: str
    margin: float | None


def pairs_in(group: Group) -> Iterator[PairTexts]:
    """The group's pairs, in order."""
    for pair in group.pairs:
        yield PairTexts(group.responses[pair.chosen].text, group.responses[pair.rejected].text, group.margin(pair))


def choose(dataset: Dataset, form: str, problem: Callable[[Group], str | None], skip_videos: bool) -> Chosen:
    """Looks at every group. Raises WriteBackError where one has a `problem`, or none has a pair."""
    chosen, problems, with_margin = Chosen(), list[str](), 0
    for row, group in enumerate(dataset.groups()):
        if not group.pairs:
            chosen.without_pairs += 1
            continue
        video = any(media.kind == "video" for media in group.media)
        if video and skip_videos:
            chosen.with_videos += 1
            continue
        found = VIDEO if video else problem(group) if group.one_prompt else CROSSED
        if found is not None:
            problems.append(f"  {one_line(group.id)[:60]} ({one_line(str(group.origins[0]))}): {found}")
            continue
        chosen.rows.append(row)
        chosen.pairs += len(group.pairs)
        with_margin += sum(group.margin(pair) is not None for pair in group.pairs)
        chosen.media = chosen.media or bool(group.media)
        named = {index for pair in group.pairs for index in (pair.chosen, pair.rejected)}
        chosen.unpaired += len(group.responses) - len(named)
        chosen.reasons += sum(response.reason is not None for response in group.responses)
    if problems:
        more = [f"  ... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        listed = "\n".join([*problems[:SHOWN], *more])
        raise WriteBackError(f"{dataset.path}: {len(problems)} groups have what rows of {form} cannot hold:\n{listed}")
    if not chosen.rows:
        raise WriteBackError(f"{dataset.path}: no group has a pair that could be written")
    chosen.margins = with_margin == chosen.pairs
    chosen.bare_margins = 0 if chosen.margins else with_margin
    return chosen
