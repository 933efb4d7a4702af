"""What a preparation read, kept and turned away."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmrlhf_jax.command import one_line
from mmrlhf_jax.data.buckets import MAX_BUCKETS, MULTIPLE, ItemLengths, plan_buckets
from mmrlhf_jax.data.ranking import pairs_of, tied
from mmrlhf_jax.data.sources.rows import Rejected, Remark
from mmrlhf_jax.groups import Group, Lengths, Origin

SHOWN = 20  # rejected rows printed; the file has all


@dataclass(frozen=True, slots=True)
class Spread:
    """Order statistics of token counts (of tiles: pictures cut to the tower's size)."""

    min: int
    median: int
    p90: int
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        low, median, p90, high = np.percentile(values, [0, 50, 90, 100], method="higher")
        return cls(int(low), int(median), int(p90), int(high))


@dataclass(frozen=True, slots=True)
class Report:
    """Counts over kept groups, and every row that is in none of them.

    rows                all rows read: those in groups, and `rejected`
    responses           K -> number of groups
    pairs, ties         preferences; pairs of equally good responses, see `ranking.tied`
    complete, partial   groups whose pairs are all pairs of different rank, and those where some are not known
    lengths             "prompt", "response", "tiles", "total" (prompt + longest response) -> Spread; of every group
                        measured, those over `max_tokens` included; empty without a model
    over_max_tokens     groups rejected for their length
    margins             min, median and max margin of the pairs that have one
    buckets             lines on the static shapes that would hold them
    stages              lines on what was built of the rows, or left out of them, because an option says so
    """

    fingerprint: str
    rows: int
    groups: int
    responses: dict[int, int]
    pairs: int
    ties: int
    complete: int
    partial: int
    without_pairs: int
    pictures: int
    videos: int
    frames: int
    text_only: int
    over_max_tokens: int
    lengths: dict[str, Spread]
    rejected: tuple[Rejected, ...]
    remarks: tuple[Remark, ...]
    buckets: tuple[str, ...] = ()
    margins: tuple[float, ...] = ()
    negative_margins: int = 0
    reasons: int = 0
    stages: tuple[str, ...] = ()
    reused: bool = False

    @property
    def duplicates(self) -> int:
        return sum(row.duplicate for row in self.rejected)

    @property
    def rejected_share(self) -> float:
        """Rejected rows among all that are not duplicates."""
        bad = len(self.rejected) - self.duplicates
        return bad / max(1, self.rows - self.duplicates)

    def to_json(self) -> str:
        """Everything but the rejected rows, which have their own file."""
        fields = dataclasses.asdict(dataclasses.replace(self, rejected=()))
        del fields["rejected"], fields["reused"]
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str, rejected: Sequence[Rejected]) -> Report:
        """Inverse of `to_json`, as a report of work done earlier."""
        fields = json.loads(text)
        fields["responses"] = {int(k): n for k, n in fields["responses"].items()}
        fields["lengths"] = {name: Spread(**spread) for name, spread in fields["lengths"].items()}
        fields["buckets"], fields["margins"] = tuple(fields["buckets"]), tuple(fields["margins"])
        fields["stages"] = tuple(fields.get("stages", ()))
        fields["remarks"] = tuple(Remark(**remark) for remark in fields["remarks"])
        return cls(**fields, rejected=tuple(rejected), reused=True)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        histogram = ", ".join(f"K={k}: {n}" for k, n in sorted(self.responses.items()))
        bad = len(self.rejected) - self.duplicates
        lines = [
            f"rows       {self.rows} read, {bad} rejected, {self.duplicates} duplicates",
            f"groups     {self.groups} ({histogram})",
            f"pairs      {self.pairs}, ties {self.ties}, groups without pairs {self.without_pairs}",
            f"orders     {self.complete} complete, {self.partial} partial",
            f"reasons    {self.reasons}, responses {sum(k * n for k, n in self.responses.items())}",
            f"media      {self.pictures} pictures, {self.videos} videos ({self.frames} frames), "
            f"{self.text_only} text-only groups",
        ]
        if self.margins:
            low, middle, high = self.margins
            lines.append(
                f"margins    min {low:g}, median {middle:g}, max {high:g}; {self.negative_margins} negative"
                + (", which MM-DPO takes as 0" if self.negative_margins else "")
            )
        lines += [
            f"{name:<10} min {s.min}, median {s.median}, p90 {s.p90}, max {s.max}" for name, s in self.lengths.items()
        ]
        lines += [f"stage      {one_line(stage)}" for stage in self.stages]
        lines += [f"bucket     {bucket}" for bucket in self.buckets]
        if self.lengths:
            lines.append(f"too long   {self.over_max_tokens} groups over --max-tokens")
        lines += [f"note       {one_line(remark.text)} ({remark.rows} rows)" for remark in self.remarks]
        lines += [f"rejected   {one_line(f'{row.origin}: {row.reason}')}" for row in self.rejected[:SHOWN]]
        if len(self.rejected) > SHOWN:
            lines.append(f"rejected   ... and {len(self.rejected) - SHOWN} more in rejected.jsonl")
        return lines


def report_of(
    fingerprint: str,
    groups: Sequence[Group],
    rejected: Sequence[Rejected],
    remarks: Sequence[Remark],
    measured: Sequence[Lengths],
    over_max_tokens: int,
    stages: Sequence[str] = (),
) -> Report:
    """Count `groups`; `measured` are the lengths of every group that could be measured."""
    ranks = [tuple(response.rank for response in group.responses) for group in groups]
    listed = [{(pair.chosen, pair.rejected) for pair in group.pairs} for group in groups]
    complete = [pairs == set(pairs_of(rank)) for pairs, rank in zip(listed, ranks, strict=True)]
    margins = [m for g in groups for p in g.pairs if (m := g.margin(p)) is not None]
    media = [m for group in groups for m in group.media]
    videos = [m for m in media if m.kind == "video"]
    return Report(
        fingerprint=fingerprint,
        rows=sum(len(group.origins) for group in groups) + len(rejected),
        groups=len(groups),
        responses=dict(Counter(len(group.responses) for group in groups)),
        pairs=sum(len(group.pairs) for group in groups),
        ties=sum(len(tied(group)) for group in groups),
        complete=sum(complete),
        partial=len(groups) - sum(complete),
        without_pairs=sum(not group.pairs for group in groups),
        reasons=sum(response.reason is not None for group in groups for response in group.responses),
        pictures=len(media) - len(videos),
        videos=len(videos),
        frames=sum(len(m.sizes) for m in videos),
        text_only=sum(not group.media for group in groups),
        over_max_tokens=over_max_tokens,
        lengths=_spreads(measured),
        buckets=_buckets(measured),
        margins=(min(margins), statistics.median(margins), max(margins)) if margins else (),
        negative_margins=sum(margin < 0 for margin in margins),
        rejected=tuple(rejected),
        remarks=tuple(remarks),
        stages=tuple(stages),
    )


def _spreads(measured: Sequence[Lengths]) -> dict[str, Spread]:
    if not measured:
        return {}
    return {
        "prompt": Spread.of([lengths.prompt for lengths in measured]),
        "response": Spread.of([tokens for lengths in measured for tokens in lengths.responses]),
        "total": Spread.of([lengths.prompt + max(lengths.responses) for lengths in measured]),
        "tiles": Spread.of([lengths.tiles for lengths in measured]),
    }


def _buckets(measured: Sequence[Lengths]) -> tuple[str, ...]:
    """The static shapes a run would compile for these groups, one group a row; a run plans its own."""
    if not measured:
        return ()
    sizes = [(lengths.tiles, lengths.prompt, sum(lengths.responses)) for lengths in measured]
    plan = plan_buckets(
        ItemLengths(*np.array(sizes, np.int64).T),
        max_buckets=MAX_BUCKETS,
        multiple=MULTIPLE,
        slots_per_shard=1,
        shards=1,
        groups_per_step=1,
    )
    counts = np.bincount(plan.assignment, minlength=len(plan.buckets))
    described = [
        f"{b.tiles} tiles, {b.prompt} prompt + {b.response} response slots: {n} groups"
        for b, n in zip(plan.buckets, counts, strict=True)
    ]
    return (*described, f"{plan.padding_share:.1%} of their slots are padding")


def rejected_to_json(rows: Sequence[Rejected]) -> str:
    """One JSON object a line: file, line, reason, duplicate."""
    return "".join(
        json.dumps({"file": r.origin.file, "line": r.origin.line, "reason": r.reason, "duplicate": r.duplicate}) + "\n"
        for r in rows
    )


def rejected_from_json(text: str) -> list[Rejected]:
    """Inverse of `rejected_to_json`."""
    rows = [json.loads(line) for line in text.splitlines()]
    return [Rejected(Origin(r["file"], r["line"]), r["reason"], r["duplicate"]) for r in rows]
