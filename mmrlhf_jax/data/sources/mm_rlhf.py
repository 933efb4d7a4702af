"""MM-RLHF's `dpo_pairs.jsonl` and `mm_reward_bench.jsonl`: one pair a row, several rows a query.

Columns read: `id`, `image` (path or list) or `video` (a directory of frames, or a file) or neither, `prompt`,
`chosen`, `rejected`, optional `chosen_reason`, `rejected_reason`, `is_tie`, and the margin column the user names. Rows
of the same id, prompt and media are one group; the same text is the same response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from mmrlhf_jax.data.sources.pairs import PairRow, check_different, margin_of, read_pairs
from mmrlhf_jax.data.sources.pictures import media_of
from mmrlhf_jax.data.sources.rows import (
    Item,
    Row,
    RowError,
    SourceError,
    SourceOptions,
    id_of,
    optional_text_of,
    prompt_of,
    text_of,
)
from mmrlhf_jax.groups import Turn

COLUMNS = ("id", "image", "video", "prompt", "chosen", "rejected", "chosen_reason", "rejected_reason", "is_tie")


def read(files: Sequence[str], options: SourceOptions) -> Iterator[Item]:
    """Groups in order of their first row; `Rejected` rows; `Remark`s at the end.

    Raises:
        SourceError: the margin column is in no row, or `--map` was given.
    """
    if options.mapping:
        raise SourceError("--map belongs to --source mapped and sharegpt; mm_rlhf has fixed columns")
    check = partial(_check, options=options)
    yield from read_pairs(files, check, columns=COLUMNS, margin_column=options.margin_column)


def _check(row: Row, options: SourceOptions) -> PairRow:
    fields = row.fields
    for column in ("id", "prompt", "chosen", "rejected"):
        if column not in fields:
            raise RowError(f"column {column!r} is missing; the row has {', '.join(sorted(fields)) or 'none'}")
    media = media_of(fields.get("image"), fields.get("video"), options.store)
    chosen, rejected = text_of(fields["chosen"], "'chosen'"), text_of(fields["rejected"], "'rejected'")
    check_different(chosen, rejected)
    tie = False if (stated := fields.get("is_tie")) is None else stated
    if not isinstance(tie, bool):
        raise RowError("'is_tie' is not a boolean")
    name = id_of(fields["id"], "'id'")
    return PairRow(
        origin=row.origin,
        id=name,
        apart=name,
        prompt=(Turn("user", prompt_of(fields["prompt"], media)),),
        media=media,
        chosen=chosen,
        rejected=rejected,
        reasons=(
            optional_text_of(fields.get("chosen_reason"), "'chosen_reason'"),
            optional_text_of(fields.get("rejected_reason"), "'rejected_reason'"),
        ),
        tie=tie,
        margin=None if tie else margin_of(row, options.margin_column),
    )
