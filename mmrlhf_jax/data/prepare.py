"""From preference files to a prepared dataset: read rows, prove every picture, measure, write once.

Every row ends in exactly one place: in a group, or in the list of rejected rows with file, line and reason. Nothing
is cut to fit and nothing stands in for something else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.command import one_line, progress_line
from mmrlhf_jax.data import video
from mmrlhf_jax.data.cluster_sampling import Sample, Sampling, sample
from mmrlhf_jax.data.cross_prompt import Crossing, cross_prompts
from mmrlhf_jax.data.dataset import (
    FORMAT_VERSION,
    UPLOADING,
    DatasetError,
    read_metadata,
    upload_dataset,
    write_dataset,
)
from mmrlhf_jax.data.media import MAX_FRAMES, MAX_MEDIA_BYTES, MediaError, MediaRoot, read_media, verify_media
from mmrlhf_jax.data.pair_choice import Pairs, choose_pairs
from mmrlhf_jax.data.report import Report, rejected_from_json, rejected_to_json, report_of
from mmrlhf_jax.data.sources import read_source
from mmrlhf_jax.data.sources.pictures import PictureStore, is_embedded
from mmrlhf_jax.data.sources.rows import Rejected, Remark, SourceOptions
from mmrlhf_jax.groups import Group, Lengths, Media, Renderer
from mmrlhf_jax.lease import beside, lease

REJECTED_FILE = "rejected.jsonl"
REPORT_FILE = "report.json"
SAMPLE_FILE = "sample.jsonl"  # every group that was read, its cluster, and whether it was taken


class PrepareError(ValueError):
    """Nothing was prepared; the message says why."""


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """What is prepared, and how.

    media          root of all media paths; None where no row names any, as where all pictures stand in the rows
    renderer       measures lengths; needed for `max_tokens`
    max_tokens     a group whose prompt + longest response is longer is rejected, never cut
    max_frames     a frame directory with more is rejected
    video_frames   so many, evenly spaced, are stored of a video file
    max_rejected   share of rejected rows (duplicates aside) above which nothing is prepared
    limit          only the first so many groups that are read; all rows are read, since those of a group may stand
                   anywhere
    sampling       so many groups, evenly from clusters of their embeddings, see `cluster_sampling`
    gap, pairs     which pairs stay, see `pair_choice`
    crossing       pairs across questions about the same pictures, see `cross_prompt`
                   With a gap or with pairs across questions, scores rank responses that have no ranks.
    """

    source: str
    inputs: tuple[str, ...]
    output: str
    media: str | None = None
    source_options: SourceOptions = field(default_factory=SourceOptions)
    renderer: Renderer | None = None
    max_tokens: int | None = None
    max_frames: int = MAX_FRAMES
    video_frames: int = video.FRAMES
    max_rejected: float = 0.05
    limit: int | None = None
    sampling: Sampling | None = None
    gap: float | None = None
    pairs: Pairs = "all"
    crossing: Crossing | None = None
    workers: int = 4
    progress: bool = False


@dataclass(frozen=True, slots=True)
class Proven:
    """Media with sizes and sha256, every picture of which has been decoded; bytes left behind."""

    media: Media
    byte_count: int


@dataclass(slots=True)
class _Sorting:
    """Groups still good, and where every other row went."""

    groups: list[Group] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    sample: Sample | None = None

    def reject(self, group: Group, reason: str) -> None:
        self.rejected += [Rejected(origin, reason) for origin in group.origins]


def prepare(options: PrepareOptions) -> Report:
    """Write `options.output`, or find it already written from the same inputs.

    The dataset appears under its name only when whole; an interrupted run leaves hidden siblings (on gs:// a marked
    half of an upload) that the next one clears away. Pictures that stand in rows lie in such a sibling meanwhile; for
    an `output` on gs:// they, and the dataset, lie in the temporary directory (TMPDIR).

    Raises:
        SourceError: the input cannot be read as asked.
        DatasetError: `output` holds something else, or was prepared from other inputs.
        SamplingError: embeddings that do not fit the groups.
        CrossPromptError: nothing can be compared across questions.
        PrepareError: too many rows are bad (they are listed in `output`/rejected.jsonl), or none is good.
        LeaseError: another job prepares `output`.
    """
    if options.max_tokens is not None and options.renderer is None:
        raise PrepareError("--max-tokens needs --model: lengths are counted in the model's tokens")
    output = storage.to_path(options.output)
    metadata = _metadata(options)
    if (done := _find_done(output, metadata)) is not None:
        return _as_before(done, options, output)
    with lease(beside(output), str(output)):
        if (done := _find_done(output, metadata)) is not None:  # by the job that this one waited for
            return _as_before(done, options, output)
        _clear_waiting(output)
        try:
            return _prepare(options, output, metadata)
        finally:
            _clear_waiting(output)


def _prepare(options: PrepareOptions, output: epath.Path, metadata: dict[str, Any]) -> Report:
    sorting = _read(options)
    _take_sample(sorting, options)
    _choose_pairs(sorting, options)
    bytes_of = _prove_media(sorting, options)
    if options.crossing is not None and sorting.groups:
        sorting.groups, line = cross_prompts(sorting.groups, options.crossing)
        sorting.stages.append(line)
    measured, over = _measure(sorting, options)
    report = report_of(
        metadata["fingerprint"], sorting.groups, sorting.rejected, sorting.remarks, measured, over, sorting.stages
    )
    try:
        _check_share(report, options, output)
    except PrepareError:
        output.mkdir(parents=True, exist_ok=True)
        (output / REJECTED_FILE).write_text(rejected_to_json(report.rejected))
        raise
    beside = {REJECTED_FILE: rejected_to_json(report.rejected), REPORT_FILE: report.to_json()}
    if sorting.sample is not None:
        beside[SAMPLE_FILE] = sorting.sample.to_json()
    _write(output, sorting.groups, bytes_of, beside, metadata, options)
    return report


def _metadata(options: PrepareOptions) -> dict[str, Any]:
    """What the dataset is a function of, and its sha256.

    Picture bytes are left out: hashing them would cost as much as preparing. A changed picture needs a new `output`.
    """
    stated = {
        "format_version": FORMAT_VERSION,
        "inputs": [_sha256(file) for file in options.inputs],
        "source": options.source,
        "map": dict(options.source_options.mapping),
        "margin_column": options.source_options.margin_column,
        "media": options.media if options.media is None or "://" in options.media else os.path.abspath(options.media),
        "renderer": None if options.renderer is None else options.renderer.fingerprint,
        "max_tokens": options.max_tokens,
        "max_frames": options.max_frames,
        "video_frames": options.video_frames,
    }
    # Unstated unless asked for: datasets from before they existed stay what they are.
    asked = {"limit": options.limit, "gap": options.gap, "pairs": None if options.pairs == "all" else options.pairs}
    stated |= {name: value for name, value in asked.items() if value is not None}
    if options.crossing is not None:
        stated["crossing"] = [*dataclasses.astuple(options.crossing)]
    if (drawn := options.sampling) is not None:
        files = [_sha256(drawn.embeddings, "--embeddings"), _sha256(drawn.ids, "--embedding-ids")]
        stated["sampling"] = [*files, drawn.count, drawn.clusters, drawn.seed]
    canonical = json.dumps(stated, sort_keys=True)
    return {**stated, "fingerprint": hashlib.sha256(canonical.encode()).hexdigest()}


def _sha256(file: str, option: str = "--input") -> str:
    path = storage.to_path(file)
    if path.is_dir():
        raise PrepareError(f"{file} is a directory: name the files in it as {option}")
    if not path.exists():
        raise PrepareError(f"{file} does not exist: correct {option}")
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            total.update(block)
    return total.hexdigest()


def _find_done(output: epath.Path, metadata: dict[str, Any]) -> Report | None:
    if not output.exists():
        return None
    found = read_metadata(output) if output.is_dir() else None
    if found is None:
        if (output / UPLOADING).exists():
            return None
        if not output.is_dir() or any(child.name != REJECTED_FILE for child in output.iterdir()):
            raise DatasetError(f"{output} exists and is not a prepared dataset: choose another --output")
        return None
    if found.get("fingerprint") != metadata["fingerprint"]:
        keys = dict.fromkeys([*metadata, *found])
        changed = ", ".join(key for key in keys if key != "fingerprint" and found.get(key) != metadata.get(key))
        raise DatasetError(
            f"{output} was prepared from other inputs or options (fingerprint {found.get('fingerprint')}, this run is "
            f"{metadata['fingerprint']}; different: {changed}): choose another --output or remove it"
        )
    try:
        rejected = rejected_from_json((output / REJECTED_FILE).read_text())
        report = Report.from_json((output / REPORT_FILE).read_text(), rejected)
        report.lines(), report.rejected_share
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        said = one_line(str(error))[:200]
        raise DatasetError(f"a report in {output} is damaged ({said}): remove the directory and run again") from error
    return report


def _as_before(done: Report, options: PrepareOptions, output: epath.Path) -> Report:
    _clear_aside(output)
    _clear_waiting(output)
    _check_share(done, options, output)
    return done


def _check_share(report: Report, options: PrepareOptions, output: epath.Path) -> None:
    where = f"see {output / REJECTED_FILE}"
    if reasons := Counter(row.reason for row in report.rejected if not row.duplicate):
        reason, count = reasons.most_common(1)[0]
        often = f"most often, {count} times" if count > 1 else "the first"
        where = f"{where} ({often}: {one_line(reason)})"
    if options.media and report.groups and report.text_only == report.groups:
        columns = [remark.text for remark in report.remarks if remark.text.endswith("is not read")]
        unread = "; ".join(columns) or "no unknown columns"
        raise PrepareError(f"--media is given, yet no row names a picture or video in a column that is read ({unread})")
    if not report.groups:
        raise PrepareError(f"none of {report.rows} rows became a group: {where}")
    if report.rejected_share > options.max_rejected:
        bad = len(report.rejected) - report.duplicates
        raise PrepareError(
            f"{bad} of {report.rows - report.duplicates} rows were rejected ({report.rejected_share:.3f}), more than "
            f"--max-rejected {options.max_rejected:g}: {where}, mend the input or raise the share"
        )


def _read(options: PrepareOptions) -> _Sorting:
    store = PictureStore(_waiting(epath.Path(options.output), "pictures"))
    sorting, left_out = _Sorting(), 0
    by_score = options.gap is not None or options.crossing is not None
    said = dataclasses.replace(options.source_options, store=store, by_score=by_score)
    for item in read_source(options.source, options.inputs, said):
        match item:
            case Group() if options.limit is not None and len(sorting.groups) >= options.limit:
                left_out += len(item.origins)
            case Group():
                sorting.groups.append(item)
            case Rejected():
                sorting.rejected.append(item)
            case Remark():
                sorting.remarks.append(item)
    if not by_score and (unranked := sum(map(_is_scored_and_tied, sorting.groups))):
        text = "scored responses without ranks: none is preferred; --gap 0 has their scores rank"
        sorting.remarks.append(Remark(text, unranked))
    if left_out:
        sorting.remarks.append(Remark(f"--limit {options.limit}: rows of further groups are left out", left_out))
    return sorting


def _is_scored_and_tied(group: Group) -> bool:
    scores, ranks = ({getattr(response, name) for response in group.responses} for name in ("score", "rank"))
    return len(ranks) == 1 and len(scores) > 1 and not group.ties


def _take_sample(sorting: _Sorting, options: PrepareOptions) -> None:
    if options.sampling is None:
        return
    found = sorting.sample = sample(sorting.groups, options.sampling)
    left_out = [group for group, taken in zip(sorting.groups, found.taken, strict=True) if not taken]
    sorting.groups = [group for group, taken in zip(sorting.groups, found.taken, strict=True) if taken]
    rows = sum(len(group.origins) for group in left_out)
    sorting.stages.append(f"{found.line(options.sampling)}; {rows} rows left out, see {SAMPLE_FILE}")


def _choose_pairs(sorting: _Sorting, options: PrepareOptions) -> None:
    sorting.groups, rejected, lines = choose_pairs(sorting.groups, options.gap, options.pairs)
    sorting.rejected += rejected
    sorting.stages += lines


def _prove_media(sorting: _Sorting, options: PrepareOptions) -> dict[Media, int]:
    """Replace media by their proven selves (sizes, sha256); returns how many encoded bytes each has."""
    wanted = list(dict.fromkeys(media for group in sorting.groups for media in group.media))
    if not wanted:
        return {}
    paths = [media for media in wanted if not is_embedded(media)]
    root = _media_root(options) if paths else _store_root(options)
    with ThreadPoolExecutor(options.workers) as pool:  # Pillow's decoders release the GIL
        try:
            results = pool.map(lambda m: prove(m, _store_root(options) if is_embedded(m) else root), wanted)
            proven = dict(zip(wanted, _progress(results, "media", len(wanted), options), strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    whole = {media: result for media, result in proven.items() if isinstance(result, Proven)}
    kept = []
    for group in sorting.groups:
        reasons = [str(proven[media]) for media in group.media if media not in whole]
        total = sum(whole[media].byte_count for media in group.media if media in whole)
        if total > MAX_MEDIA_BYTES:
            reasons.append(f"its pictures have {total} bytes, more than {MAX_MEDIA_BYTES}: shrink them")
        if reasons:
            sorting.reject(group, "; ".join(reasons))
        else:
            kept.append(dataclasses.replace(group, media=tuple(whole[media].media for media in group.media)))
    sorting.groups = kept
    return {result.media: result.byte_count for result in whole.values()}


def _media_root(options: PrepareOptions) -> MediaRoot:
    if options.media is None:
        raise PrepareError("the rows name pictures or videos: give their root with --media")
    if not epath.Path(options.media).is_dir():
        raise PrepareError(f"{options.media} is not a directory: correct --media")
    return MediaRoot(
        options.media,
        max_frames=options.max_frames,
        video_frames=options.video_frames,
        spool=os.fspath(_waiting(epath.Path(options.output), "frames")),
    )


def _store_root(options: PrepareOptions) -> MediaRoot:
    """Where the pictures lie that stood in rows."""
    return MediaRoot(os.fspath(_waiting(epath.Path(options.output), "pictures")))


def prove(media: Media, root: MediaRoot) -> Proven | str:
    """The media without their bytes, or what is wrong with them."""
    try:
        whole = verify_media(media, root)
    except MediaError as error:
        return str(error)
    except OSError as error:
        return f"{media.path!r} cannot be read: {error}"
    return Proven(dataclasses.replace(whole, encoded=()), sum(map(len, whole.encoded)))


def _measure(sorting: _Sorting, options: PrepareOptions) -> tuple[list[Lengths], int]:
    """Lengths of the groups with the renderer. Those over `max_tokens`, or over what the model can take, are rejected.
    Returns lengths of the others, and how many were over."""
    renderer = options.renderer
    if renderer is None:
        return [], 0
    limit = min(options.max_tokens or renderer.max_positions, renderer.max_positions)
    named = f"--max-tokens {limit}" if limit == options.max_tokens else f"the model's {limit} positions"
    kept, measured, over = [], [], 0
    for group in _progress(sorting.groups, "lengths", len(sorting.groups), options):
        try:
            lengths = renderer.measure(group)
        except ValueError as error:
            sorting.reject(group, f"cannot be rendered: {error}")
            continue
        longest = max(lengths.responses)
        if lengths.prompt + longest > limit:
            over += 1
            sorting.reject(
                group,
                f"{lengths.prompt + longest} tokens (prompt {lengths.prompt}, longest response {longest}), more than "
                f"{named}: nothing is cut; shorten the row or leave it out",
            )
            continue
        kept.append(group)
        measured.append(lengths)
    sorting.groups = kept
    return measured, over


def _write(
    output: epath.Path,
    groups: Sequence[Group],
    bytes_of: Mapping[Media, int],
    beside: Mapping[str, str],
    metadata: dict[str, Any],
    options: PrepareOptions,
) -> None:
    """Write beside `output`, or in the temporary directory where `output` is remote, then give it its name."""
    if storage.is_remote(output):
        with tempfile.TemporaryDirectory(prefix="mmrlhf-prepare-") as folder:
            upload_dataset(_write_files(epath.Path(folder), groups, bytes_of, beside, metadata, options), output)
        return
    whole = _write_files(_clear_aside(output), groups, bytes_of, beside, metadata, options)
    if output.exists():
        output.rmtree()  # holds at most the list of an earlier refusal, see _find_done
    whole.rename(output)
    _clear_aside(output)


def _write_files(
    directory: epath.Path,
    groups: Sequence[Group],
    bytes_of: Mapping[Media, int],
    beside: Mapping[str, str],
    metadata: dict[str, Any],
    options: PrepareOptions,
) -> epath.Path:
    """Write the dataset and the texts `beside` it somewhere under `directory`; returns the folder that holds them."""
    with progress_line(total=len(groups), desc="writing", disable=not options.progress, unit="group") as bar:

        def load(group: Group) -> list[bytes]:
            bar.update()
            return _reload(group, options)

        byte_counts = [sum(bytes_of[media] for media in group.media) for group in groups]
        whole = write_dataset(directory, groups, byte_counts, load, metadata, options.workers)
    for name, text in beside.items():
        (whole / name).write_text(text)
    return whole


def _clear_aside(output: epath.Path) -> epath.Path:
    """Where a dataset is written before it gets its name, emptied of what an interrupted run left. On gs:// that is
    the marker of an upload that was whole but for removing it."""
    if storage.is_remote(output):
        (output / UPLOADING).unlink(missing_ok=True)
        return output
    aside = output.parent / f".{output.name}.preparing"
    _clear(aside)
    return aside


def _waiting(output: epath.Path, what: str) -> epath.Path:
    """Where `what` waits on a local disk till it is written: `pictures` that stood in rows, `frames` of video files."""
    name = f".{output.name}.{what}"
    if not storage.is_remote(output):
        return output.parent / name
    # named by the output, so that the next run finds and clears what a killed one left
    place = hashlib.sha256(os.fspath(output).encode()).hexdigest()[:16]
    return epath.Path(tempfile.gettempdir()) / f"{name}-{place}"


def _clear_waiting(output: epath.Path) -> None:
    """What an interrupted run left may be of other files."""
    for what in ("pictures", "frames"):
        _clear(_waiting(output, what))


def _clear(directory: epath.Path) -> None:
    if directory.exists():
        directory.rmtree()


def _reload(group: Group, options: PrepareOptions) -> list[bytes]:
    encoded: list[bytes] = []
    for media in group.media:
        root = _store_root(options) if is_embedded(media) else _media_root(options)
        again = read_media(dataclasses.replace(media, sizes=(), sha256=""), root)
        if again.sha256 != media.sha256:
            raise PrepareError(f"{media.path!r} changed while it was prepared: run again")
        encoded += again.encoded
    return encoded


def _progress(items: Iterable[Any], what: str, total: int, options: PrepareOptions) -> Iterable[Any]:
    return progress_line(items, desc=what, total=total, disable=not options.progress)
