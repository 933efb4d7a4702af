"""The readers that take files of strangers, each as: valid files, a way to spoil them, what the reader makes of it.

`make` spoils (a pure function of the Random), `run` reads and names the outcomes; every exception that is not among
`refusals` is a crash. `run` also holds what must be true of whatever is accepted: all rows accounted for, texts that
can be written, nothing from outside the media root.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import corpus
import mutate
import stored
from data_samples import WordCounter

from mmrlhf_jax.data import containers, media, video
from mmrlhf_jax.data.media import MediaError, MediaRoot
from mmrlhf_jax.data.mixture import MixtureError, open_mixture
from mmrlhf_jax.data.sources import read_source
from mmrlhf_jax.data.sources.pictures import PictureStore
from mmrlhf_jax.data.sources.rows import Rejected, Remark, SourceError, SourceOptions, read_rows
from mmrlhf_jax.evaluation import comparisons, reward_bench, vl_reward_bench
from mmrlhf_jax.evaluation.comparisons import BenchmarkError, as_groups, lengths_of
from mmrlhf_jax.groups import Group, Media, Turn
from mmrlhf_jax.inference import prompts

Made = dict[str, Any]


@dataclass(frozen=True)
class Reader:
    """`start(folder)` makes the state that `make(rng, state)` and `run(state, made)` share; `modules` are what it
    covers, `slow` divides the number of executions."""

    name: str
    modules: tuple[str, ...]
    refusals: tuple[type[BaseException], ...]
    start: Callable[[Path], Any]
    make: Callable[[Random, Any], Made]
    run: Callable[[Any, Made], Iterable[str]]
    slow: int = 1


@dataclass
class Rows:
    folder: Path
    rows: list[Any]
    store: Any
    root: Path | None = None
    tables: list[bytes] = field(default_factory=list)


def classed(message: str) -> str:
    """A message without what differs from row to row."""
    message = re.sub(r"/\S*?(?=[:\s]|$)", "PATH", message)
    message = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'…'", message, flags=re.DOTALL)
    return re.sub(r"-?\d[\d.e+]*", "N", " ".join(message.split()))[:70]


def _rows_at(name: str, media_too: bool = False) -> Callable[[Path], Rows]:
    def start(folder: Path) -> Rows:
        from etils import epath

        root = corpus.media_root(folder) if media_too else None
        return Rows(folder, corpus.text_rows()[name], PictureStore(epath.Path(folder) / "pictures"), root)

    return start


def _spoiled_rows(rng: Random, state: Rows) -> Made:
    rows = corpus.some(rng, state.rows)
    if rng.random() < 0.8:
        at = rng.randrange(len(rows))
        rows[at] = mutate.mutated(rng, rows[at], rng.choice((1, 1, 1, 2, 3)))
    data = mutate.json_file(rng, rows)
    if rng.randrange(4_000) == 0:  # a line of 100 MB
        data += b'{"id": "' + b"x" * 100 * 2**20 + b'"}\n'
    name = rng.choice(("in.jsonl", "in.jsonl", "in.json"))
    (state.folder / name).write_bytes(data)
    return {
        "file": str(state.folder / name),
        "lines": _lines(data) if name == "in.jsonl" else None,
        "rng": rng.random(),
    }


def _lines(data: bytes) -> int:
    """Rows there must be an account of: lines with anything in them."""
    return sum(bool(line.strip()) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


def _source(name: str, *choices: SourceOptions) -> Callable[[Rows, Made], Iterable[str]]:
    import dataclasses

    def run(state: Rows, made: Made) -> Iterable[str]:
        options = choices[int(made["rng"] * len(choices))]
        store = None if made["rng"] < 0.02 else state.store
        items = list(read_source(name, [made["file"]], dataclasses.replace(options, store=store)))
        for item in items:
            if isinstance(item, Rejected):
                assert len(item.reason) < 2_000, "a reason as long as its row"
                yield f"rejected: {classed(item.reason)}"
            elif isinstance(item, Remark):
                yield "remark"
            else:
                check_group(item)
                yield "accepted"
        origins = [o.line for i in items if isinstance(i, Group) for o in i.origins]
        origins += [i.origin.line for i in items if isinstance(i, Rejected)]
        assert made["lines"] is None or made["lines"] == len(origins) == len(set(origins)), "a row without an account"

    return run


def check_group(group: Group) -> None:
    """What every later stage relies on."""
    assert Group.from_json(group.to_json()) == group
    for text in (group.id, *(turn.text for turn in group.prompt), *(r.text for r in group.responses)):
        text.encode()
        assert "\0" not in text
    for pair in group.pairs:
        assert group.responses[pair.chosen].rank < group.responses[pair.rejected].rank
    group.content_hash()


def _rows_of_all(folder: Path) -> Rows:
    state = _rows_at("mm_rlhf")(folder)
    every = corpus.text_rows()
    state.rows = [row for name, *_ in _SOURCES for row in every[name]]
    return state


def _spoiled_any(rng: Random, state: Rows) -> Made:
    """As JSON, or as parquet where it can be written as that."""
    import pyarrow as pa

    if rng.random() < 0.7:
        return _spoiled_rows(rng, state)
    rows = [row if rng.random() < 0.5 else mutate.mutated(rng, row, 1) for row in corpus.some(rng, state.rows)]
    try:
        data = _table(pa.Table.from_pylist(rows))
    except Exception:  # values of several kinds, keys that are no text: it cannot be written
        return _spoiled_rows(rng, state)
    (state.folder / "in.parquet").write_bytes(data)
    return {"file": str(state.folder / "in.parquet"), "lines": None, "rng": rng.random()}


def _read_any(state: Rows, made: Made) -> Iterable[str]:
    """Rows of one format in a file of another too: whatever the rows are, they are read alike."""
    name, _, choices = _SOURCES[int(made["rng"] * 1e6) % len(_SOURCES)]
    file = made["file"] if made["rng"] > 0.02 else str(state.folder / ("gone" if made["rng"] < 0.01 else "pictures"))
    return _source(name, *choices)(state, {**made, "file": file})


def _read_rows(state: Rows, made: Made) -> Iterable[str]:
    for row in read_rows([made["file"]]):
        yield f"rejected: {classed(row.reason)}" if isinstance(row, Rejected) else "row"


def _parquet_at(folder: Path) -> Rows:
    import pyarrow as pa

    state = _rows_at("mm_rlhf")(folder)
    texts = pa.array(["What?", None, "w" * 50])
    columns = {
        "id": texts,
        "n": pa.array([1, 2, None]),
        "f": pa.array([1.0, float("nan"), float("inf")]),
        "b": pa.array([b"x", b"", None]),
        "image": pa.array([{"bytes": b"x", "path": "a"}, None, {"bytes": None, "path": "b"}]),
        "l": pa.array([["a", None], [], None]),
        "d": texts.dictionary_encode(),
        "t": pa.array([0, 10**12, None], pa.timestamp("s", tz="Europe/Paris")),
        "m": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        "x": pa.array([1, 2, 3], pa.decimal128(5, 1)),
        "deep": pa.array([[[[["a"]]]], None, []]),
        "u": pa.array([b"0123456789abcdef"] * 3, pa.uuid()),
        "day": pa.array([0, 2**31 - 1, None], pa.date32()),
        "zone": pa.array([0, 1, 2], pa.timestamp("us", tz="Foo/Bar")),
        "dur": pa.array([1, 2, 3], pa.duration("us")),
        "time": pa.array([1, 2, 3], pa.time64("us")),
    }
    state.rows = list(columns.items())
    state.tables = [
        _table(dict(state.rows[i : i + 3]), **how) for i in range(0, len(state.rows), 3) for how in _COMPRESSED
    ]
    return state


_COMPRESSED: tuple[dict[str, Any], ...] = (
    {"compression": "none"},
    {"compression": "snappy"},
    {"compression": "zstd", "version": "1.0"},
    {"use_dictionary": False, "compression": "gzip", "data_page_version": "2.0"},
    {"row_group_size": 1, "write_page_checksum": True},
)


def _table(columns: Any, **how: Any) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), buffer, **how)
    return buffer.getvalue()


def _spoiled_parquet(rng: Random, state: Rows) -> Made:
    import pyarrow as pa

    path = state.folder / "in.parquet"
    if rng.random() < 0.2:
        columns = dict(rng.sample(state.rows, 3))
        if rng.random() < 0.5:
            name = mutate.hostile_text(rng)[:200]
            columns[name] = pa.array(
                [t if "\0" not in t else "nul\0" for t in (mutate.hostile_text(rng) for _ in range(3))]
            )
        data = _table(columns, **rng.choice(_COMPRESSED))
    else:
        data = rng.choice(state.tables)
    if rng.random() < 0.85:
        data = mutate.mutated_bytes(rng, data, state.tables)
    if rng.random() < 0.5 and len(data) > 8:  # the footer is where all the numbers are
        at = max(0, len(data) - 8 - rng.randrange(1, 600))
        data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    path.write_bytes(data)
    return {"file": str(path)}


def _picture_at(folder: Path) -> list[bytes]:
    return corpus.pictures()


def _spoiled_picture(rng: Random, made: list[bytes]) -> Made:
    data = rng.choice(made)
    if rng.random() < 0.9:
        data = mutate.mutated_bytes(rng, data, made)
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:
        data = corpus.png_with_right_sums(data)
    return {"data": data}


def _run_picture(_: Any, made: Made) -> Iterable[str]:
    width, height = media.picture_size(made["data"])
    pixels = media.decode(made["data"])
    if pixels.shape != (height, width, 3):
        yield "header and pixels differ"
    assert pixels.dtype == "uint8"
    yield "accepted"


def _media_at(folder: Path) -> Rows:
    root = corpus.media_root(folder)
    names = [str(path.relative_to(root)) for path in root.rglob("*")]
    return Rows(folder, names, None, root)


def _spoiled_path(rng: Random, state: Rows) -> Made:
    path = rng.choice(state.rows)
    for _ in range(rng.choice((0, 1, 1, 2))):
        at, more = (
            rng.randint(0, len(path)),
            rng.choice((mutate.hostile_text(rng), "../", "/", "..\\", "./", "\ud800", "up/", "linked/")),
        )
        path = rng.choice((path[:at] + more + path[at:], f"{path}/{more}", f"{more}/{path}", more))
    return {
        "media": Media(rng.choice(("image", "video")), path),
        "frames": rng.choice((1, 4)),
        "deep": rng.random() < 0.5,
    }


def _run_media(state: Rows, made: Made) -> Iterable[str]:
    assert state.root is not None
    root = MediaRoot(str(state.root), max_frames=made["frames"], video_frames=2, spool=str(state.folder / "spool"))
    read = media.verify_media if made["deep"] else media.read_media
    filled = read(made["media"], root)
    assert corpus.SECRET not in filled.sizes, "a picture from outside the media root"
    yield "accepted"


def _clips_at(folder: Path) -> dict[str, Any]:
    return {"clips": list(corpus.clips(folder).values()), "path": folder / "clip.mp4"}


def _spoiled_clip(rng: Random, state: dict[str, Any]) -> Made:
    data = rng.choice(state["clips"])
    kind = rng.random()
    if kind < 0.5:
        data = mutate.mutated_bytes(rng, data, state["clips"])
    elif kind < 0.95:  # at the fields of some box
        names = [
            m.end()
            for m in re.finditer(
                rb"ftyp|moov|mdat|moof|traf|trun|tfhd|stsz|stz2|stco|stsc|stts|stsd|tkhd|elst|mdhd|avih|strh|strf|idx1|movi|\x1f\x43\xb6\x75|\xae",
                data,
            )
        ]
        at = rng.choice(names or [0]) + rng.choice((-8, -4, 0, 4, 8, 12, 16, 24, 32))
        number = mutate._number(rng)
        data = data[: max(0, at)] + number + data[max(0, at) + len(number) :]
    state["path"].write_bytes(data)
    return {"bytes": len(data)}


def _run_clip(state: dict[str, Any], made: Made) -> Iterable[str]:
    from etils import epath

    frames = video.read_frames(epath.Path(state["path"]), 3)
    assert video.unpack(video.pack(frames)) == frames
    assert all(media.decode(frame).shape[2] == 3 for frame in frames)
    yield "accepted"


def _run_prompts(state: Rows, made: Made) -> Iterable[str]:
    root = None if made["rng"] < 0.1 else str(state.root)
    read = prompts.read_prompts(made["file"], root, str(state.folder / "kept"), frames=2, workers=1)
    for row in read.rejected:
        yield f"rejected: {classed(row.reason)}"
    for index, group in enumerate(read.groups):
        check_group(group)
        assert all(corpus.SECRET not in each.sizes for each in group.media), "a picture from outside the media root"
        read.with_media(index)
        yield "accepted"
    read.fingerprint()


def _no_progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class Scored:
    """What a reward model says, without one."""

    score: tuple[float, ...]

    @property
    def critiques(self) -> tuple[tuple[str, ...], ...]:
        return (("",),) * len(self.score)

    @property
    def ended(self) -> list[list[bool]]:
        return [[False]] * len(self.score)


def _benchmark(module: Any) -> Callable[[Rows, Made], Iterable[str]]:
    def run(state: Rows, made: Made) -> Iterable[str]:
        rows = module.read(made["file"], state.store)
        groups, places = as_groups(rows, human=made["rng"] < 0.5)
        assert len(places) == len(rows)
        for group in groups:
            check_group(group)
        if made["rng"] < 0.2:
            comparisons.check_reasons(rows)
        comparisons.check_lengths(groups, WordCounter(), 5)  # type: ignore[arg-type]
        root = None if made["rng"] > 0.9 else MediaRoot(str(state.root))
        kept = MediaRoot(str(state.store.directory))
        filled = comparisons.with_pictures(groups, root, kept, workers=1, progress=_no_progress)
        assert all(corpus.SECRET not in each.sizes for group in filled for each in group.media), "left the media root"
        score = 1.0 if made["rng"] > 0.05 else float("nan")
        scored = [Scored(tuple(score / (1 + k) for k in range(len(g.responses)))) for g in groups]
        comparisons.cut_short(scored)
        comparisons.row_records(rows, places, scored)
        module.measure(rows, lengths_of(rows))
        module.chance(rows)
        module.remarks(rows)
        yield "accepted"

    return run


class _Part:
    """What a mixture asks of a dataset."""

    def __init__(self, path: str):
        self.path, self.fingerprint = path, path.rsplit("/", 1)[-1]
        if self.fingerprint not in ("vqa", "chat"):
            raise ValueError(f"{path} is not a prepared dataset")

    def __len__(self) -> int:
        return 6

    def group(self, row: int) -> Group:
        return Group(f"{'short' if row % 2 else 'long'}/{row}", (Turn("user", "q"),), (), (), (), ())

    def groups(self) -> Iterable[Group]:
        return map(self.group, range(6))


def _spoiled_mixture(rng: Random, state: Rows) -> Made:
    value = rng.choice(state.rows)
    if rng.random() < 0.9:
        value = mutate.mutated(rng, value, rng.choice((1, 1, 2)))
    data = mutate.dumps(rng, value).encode("utf-8", "surrogatepass").replace(b"gs://", b"gz://")  # no network
    (state.folder / "mix.json").write_bytes(mutate.mutated_bytes(rng, data) if rng.random() < 0.1 else data)
    return {"file": str(state.folder / "mix.json")}


def _run_mixture(state: Rows, made: Made) -> Iterable[str]:
    mixed = open_mixture(made["file"], _Part)  # type: ignore[arg-type]
    assert len(list(mixed.groups())) == len(mixed)
    assert sum(len(rows) for _, rows in mixed.parts()) == len(mixed)
    mixed.group(0)
    yield "accepted"


_MARGIN = SourceOptions(margin_column="margin")
_MAP = {"prompt": "q", "responses": "a"}
_FULL = {**_MAP, "rank": "r", "score": "s", "reason": "why", "image": "pic", "video": "clip", "id": "n.id"}

_SOURCES = (
    (
        "mm_rlhf",
        ("sources/mm_rlhf", "sources/pairs", "sources/pictures", "ranking"),
        (SourceOptions(), SourceOptions(), _MARGIN),
    ),
    (
        "trl",
        ("sources/trl", "sources/conversation", "sources/pictures"),
        (SourceOptions(), SourceOptions(), SourceOptions(), _MARGIN),
    ),
    (
        "sharegpt",
        ("sources/sharegpt", "sources/conversation", "sources/pictures"),
        (
            SourceOptions(),
            SourceOptions(),
            _MARGIN,
            SourceOptions({"id": "id", "system_tag": "system"}),
            SourceOptions({"messages": "messages", "role_tag": "role", "content_tag": "content"}),
        ),
    ),
    ("rlhf_v", ("sources/rlhf_v", "sources/pictures"), (SourceOptions(), _MARGIN)),
    (
        "mapped",
        ("sources/mapped",),
        (
            SourceOptions(_FULL),
            SourceOptions(_MAP),
            SourceOptions({**_MAP, "image": "pic"}),
            SourceOptions({**_MAP, "text": "t", "rank": "r", "score": "s"}),
            SourceOptions({**_MAP, "ratings": "by", "facts": "known"}),
            SourceOptions({**_MAP, "text": "t", "ratings": "by", "facts": "known"}),
            SourceOptions({**_MAP, "text": "t", "rank": "/r"}),
        ),
    ),
)

ALL: tuple[Reader, ...] = (
    Reader("rows", ("data/sources/rows",), (SourceError,), _rows_of_all, _spoiled_any, _read_any),
    *(
        Reader(
            name,
            tuple(f"data/{m}" for m in modules),
            (SourceError,),
            _rows_at(name),
            _spoiled_rows,
            _source(name, *options),
        )
        for name, modules, options in _SOURCES
    ),
    Reader("parquet", ("data/sources/parquet",), (SourceError,), _parquet_at, _spoiled_parquet, _read_rows),
    Reader("pictures", ("data/media",), (MediaError,), _picture_at, _spoiled_picture, _run_picture),
    Reader("media", ("data/media",), (MediaError,), _media_at, _spoiled_path, _run_media),
    Reader("video", ("data/video", "data/containers"), (containers.VideoError,), _clips_at, _spoiled_clip, _run_clip),
    Reader(
        "prompts",
        ("inference/prompts", "data/sources/conversation"),
        (SourceError,),
        _rows_at("prompts", True),
        _spoiled_rows,
        _run_prompts,
    ),
    Reader(
        "reward_bench",
        ("evaluation/reward_bench", "evaluation/comparisons"),
        (SourceError, BenchmarkError),
        _rows_at("reward_bench", True),
        _spoiled_rows,
        _benchmark(reward_bench),
    ),
    Reader(
        "vl_reward_bench",
        ("evaluation/vl_reward_bench", "evaluation/comparisons", "data/media"),
        (SourceError, BenchmarkError),
        _rows_at("vl_reward_bench", True),
        _spoiled_rows,
        _benchmark(vl_reward_bench),
    ),
    Reader("mixture", ("data/mixture",), (MixtureError,), _rows_at("mixture"), _spoiled_mixture, _run_mixture),
    *(Reader(*each) for each in stored.STORED),
    Reader(
        "prepare",
        ("data/prepare",),
        (SourceError, *stored.REFUSALS_OF_PREPARE),
        _rows_at("mm_rlhf", True),
        _spoiled_rows,
        stored.run_prepare,
    ),
)
