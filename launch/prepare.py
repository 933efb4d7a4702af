"""Preference files of any known format -> a prepared dataset of groups.

    python launch/prepare.py --source mm_rlhf --input dpo_pairs.jsonl --media media/ --output prepared/

Every row ends in a group or in DATASET/rejected.jsonl with its file, line and reason. Running the same command again
finds the work done. Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Literal

import tyro

from mmrlhf_jax.command import UsageError, run_command
from mmrlhf_jax.data import video
from mmrlhf_jax.data.audit import audit
from mmrlhf_jax.data.cluster_sampling import Sampling
from mmrlhf_jax.data.cross_prompt import Crossing
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.media import MAX_FRAMES
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.sources import SOURCES
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.groups import Renderer
from mmrlhf_jax.storage import to_path, write_whole


@dataclass(frozen=True)
class Arguments:
    """Preference files of any known format -> a prepared dataset of groups."""

    source: str
    """Format of the input, one of:
    mm_rlhf: MM-RLHF's dpo_pairs.jsonl and mm_reward_bench.jsonl;
    trl: TRL's prompt, chosen, rejected as strings or messages (the prompt may be implicit), with images or image;
    sharegpt: LLaMA-Factory's conversations or messages, with chosen and rejected or (SFT) without, images, videos;
    ms_swift: ms-swift's messages with rejected_response or rejected_messages or (SFT) without, images, videos;
    rlhf_v: RLAIF-V-Dataset and RLHF-V-Dataset;
    vlfeedback: VLFeedback's completions, ranked by the mean of their three ratings; pictures are ID.jpg under --media;
    mapped: one query a row with all its responses, fields named by --map."""
    input: tuple[str, ...]
    """JSON-lines, JSON-array or .parquet files.
    A picture in them is a path under --media, a data URI (data:image/...;base64,...), or {bytes, path} as datasets has
    it, bytes being base64 in JSON."""
    output: str
    """Directory of the prepared dataset; must not hold anything else."""
    media: str | None = None
    """Root of all picture and video paths; paths that leave it are refused. Pictures that stand in rows need none."""
    model: str | None = None
    """Measure lengths with this model's tokenizer and picture layout: a Hugging Face directory, a hub id, or a RUN."""
    map: tuple[str, ...] = ()
    """TARGET=FIELD pairs: for --source mapped such as responses=answers rank=ranking;
    for --source sharegpt columns and tags as in LLaMA-Factory's dataset_info.json, such as messages=chat."""
    margin_column: str | None = None
    """The column with each pair's margin; for every source but mapped and vlfeedback, whose scores say it."""
    sample: int | None = None
    """Take so many groups, as evenly as can be from clusters of their embeddings. OUTPUT/sample.jsonl says of every
    group its cluster and whether it was taken. To have the ids, prepare once without --sample."""
    embeddings: str | None = None
    """For --sample: a .npy file of numbers [n, d], such as CLIP's of each group's picture, which --clusters K groups by
    k-means; or of whole numbers [n], which are the clusters."""
    embedding_ids: str | None = None
    """For --sample: a text file with the group's id of each row of --embeddings, one a line."""
    clusters: int | None = None
    """For --sample: how many clusters k-means makes of the embeddings (MM-RLHF: 100)."""
    seed: int | None = None
    """Of what --sample and --cross-prompt draw; 0 unless given."""
    gap: float | None = None
    """Pairs whose scores, or margins of --margin-column, are less than this apart are no pairs (and no ties); 0 leaves
    every difference. Needs --source vlfeedback, --map score=..., or --margin-column. Where --map names scores and no
    rank, the scores rank the responses."""
    pairs: Literal["all", "best_worst"] = "all"
    """all: every pair that the ranks (or rows) say; best_worst: of each group only its best and its worst response."""
    cross_prompt: int | None = None
    """Merge groups that ask different questions about the same pictures, and add for each question up to so many pairs
    with answers to the others, drawn at random; their scores say which is better, at least --gap apart. For reward
    models. Needs --source vlfeedback or --map score=..., which ranks as with --gap."""
    max_tokens: int | None = None
    """Reject groups whose prompt + longest response has more tokens (needs --model)."""
    max_frames: int = MAX_FRAMES
    """Reject directories of frames that hold more."""
    video_frames: int = video.FRAMES
    """Store so many evenly spaced frames of a video file; a run takes its own --render.frames of these."""
    max_rejected: float = 0.05
    """Fail, and prepare nothing, if a larger share of rows is rejected (duplicates aside)."""
    limit: int | None = None
    """Prepare only the first so many groups (all rows are read: those of a group may stand anywhere)."""
    workers: int = 4
    """Threads that read and decode media."""
    audit: str | None = None
    """Look for what is doubtful of the preferences (texts that differ in form alone, the same question under other ids,
    swapped preferences, length bias), print it, and write it to this JSON file."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="prepare.py")
    report = prepare(_options(arguments))
    if report.reused:
        print(f"{arguments.output} is prepared already from the same inputs and options")
    print("\n".join(report.lines()))
    if arguments.audit is not None:
        found = audit(open_dataset(arguments.output).groups(), report.rejected)
        path = to_path(arguments.audit)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(found.to_json(), indent=2) + "\n").encode())
        print("\n".join(found.lines()))


def _options(arguments: Arguments) -> PrepareOptions:
    if arguments.source not in SOURCES:
        raise UsageError(f"--source {arguments.source}: choose one of {', '.join(SOURCES)}")
    if not arguments.input:
        raise UsageError("--input needs at least one file")
    if arguments.max_tokens is not None and arguments.model is None:
        raise UsageError("--max-tokens needs --model: lengths are counted in the model's tokens")
    if not 0 <= arguments.max_rejected <= 1:
        raise UsageError(f"--max-rejected {arguments.max_rejected} is not a share between 0 and 1")
    for name in ("max_tokens", "max_frames", "video_frames", "limit", "workers", "sample", "clusters", "cross_prompt"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")
    mapping = _mapping(arguments.map)
    _check_gap(arguments, mapping)
    _check_seed(arguments)
    return PrepareOptions(
        source=arguments.source,
        inputs=arguments.input,
        output=arguments.output,
        media=arguments.media,
        source_options=SourceOptions(mapping, arguments.margin_column),
        renderer=None if arguments.model is None else _renderer(arguments.model),
        max_tokens=arguments.max_tokens,
        max_frames=arguments.max_frames,
        video_frames=arguments.video_frames,
        max_rejected=arguments.max_rejected,
        limit=arguments.limit,
        sampling=_sampling(arguments),
        gap=arguments.gap,
        pairs=arguments.pairs,
        crossing=_crossing(arguments, mapping),
        workers=arguments.workers,
        progress=True,
    )


def _sampling(arguments: Arguments) -> Sampling | None:
    if arguments.sample is None:
        for name in ("embeddings", "embedding_ids", "clusters"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is for --sample COUNT, which is not given")
        return None
    if arguments.embeddings is None or arguments.embedding_ids is None:
        raise UsageError("--sample needs --embeddings FILE.npy and --embedding-ids FILE")
    files = arguments.embeddings, arguments.embedding_ids
    return Sampling(*files, arguments.sample, arguments.clusters, arguments.seed or 0)


def _crossing(arguments: Arguments, mapping: dict[str, str]) -> Crossing | None:
    if arguments.cross_prompt is None:
        return None
    if not _has_scores(arguments, mapping):
        raise UsageError("--cross-prompt needs scores: --source vlfeedback, or --map score=FIELD of --source mapped")
    if arguments.pairs != "all":
        raise UsageError("--cross-prompt adds pairs that --pairs best_worst would leave out: give one of them")
    return Crossing(arguments.cross_prompt, arguments.gap or 0.0, arguments.seed or 0)


def _check_seed(arguments: Arguments) -> None:
    if arguments.seed is None:
        return
    if arguments.sample is None and arguments.cross_prompt is None:
        raise UsageError("--seed is for --sample and --cross-prompt, neither of which is given")
    if arguments.seed < 0:
        raise UsageError(f"--seed {arguments.seed} is negative")


def _has_scores(arguments: Arguments, mapping: dict[str, str]) -> bool:
    return arguments.source == "vlfeedback" or (arguments.source == "mapped" and "score" in mapping)


def _check_gap(arguments: Arguments, mapping: dict[str, str]) -> None:
    gap = arguments.gap
    if gap is None:
        return
    if not (math.isfinite(gap) and gap >= 0):
        raise UsageError(f"--gap {gap} is not a number from 0 on")
    if not _has_scores(arguments, mapping) and arguments.margin_column is None:
        raise UsageError(
            "--gap needs scores: --source vlfeedback, --map score=FIELD of --source mapped, --margin-column"
        )


def _mapping(pairs: tuple[str, ...]) -> dict[str, str]:
    mapping: dict[str, str] = {}
    for pair in pairs:
        target, separator, path = pair.partition("=")
        if not (target and separator and path):
            raise UsageError(f"--map {pair}: write TARGET=FIELD")
        if target in mapping:
            raise UsageError(f"--map names {target} twice")
        mapping[target] = path
    return mapping


def _renderer(model: str) -> Renderer:
    # Only here: a renderer loads a tokenizer, which takes seconds.
    from mmrlhf_jax.models.llava_onevision.render import load_renderer
    from mmrlhf_jax.training.model import assets_of

    return load_renderer(str(assets_of(model)))


if __name__ == "__main__":
    run_command(main)
