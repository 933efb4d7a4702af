"""The prepared dataset: groups and their encoded pictures as a TFDS dataset of ArrayRecord files.

Two splits in the same order: `groups` holds texts and picture sizes (`Group.to_json()`), `media` the encoded bytes of
all pictures and frames of the group, so a reader scans texts without touching pixels. TensorFlow is never imported.
`metadata.json` carries a fingerprint of the inputs and options it was made from.

ArrayRecord files are written and read on local disks only. A dataset on gs:// is uploaded when it is whole, and copied
once per host before it is read (`storage.local_copy`).

Wherever a dataset is named, a mixture of several may be: see `data.mixture`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from mmrlhf_jax import storage
from mmrlhf_jax.data.media import digest
from mmrlhf_jax.groups import Group

FORMAT_VERSION = 1  # raised whenever the same inputs would be stored differently
SHARD_BYTES = 256 * 2**20  # also what the writer holds in memory
SCAN_ROWS = 1024
INFO_FILE = "dataset_info.json"  # what TFDS knows a dataset by, hence the last one uploaded
UPLOADING = ".uploading"  # an object that stands beside half a dataset

_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's own
_FEATURES = tuple(
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        "features_dict.FeaturesDict",
        "sequence_feature.Sequence",
        "tensor_feature.Tensor",
        "text_feature.Text",
    )
)

Example = dict[str, Any]


class DatasetError(ValueError):
    """A prepared dataset that is missing, damaged or not the one asked for."""


class _OwnInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """TFDS would look among its public datasets, and leave an empty temporary folder behind every time."""


class PreparedGroups(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes shard after shard, in order.

    Not a `GeneratorBasedBuilder`: that one buffers a split before writing it and, above 1 GB, spills through
    TensorFlow.
    """

    name = "prepared_groups"
    VERSION = tfds.core.Version(f"{FORMAT_VERSION}.0.0")

    def __init__(
        self,
        *,
        groups: Sequence[Group],
        byte_counts: Sequence[int],
        load: Callable[[Group], list[bytes]],
        metadata: Mapping[str, Any],
        workers: int,
        **options: Any,
    ):
        self._groups, self._byte_counts, self._load, self._stamp = groups, byte_counts, load, metadata
        self._workers = workers
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        pictures = tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_))
        return _OwnInfo(
            builder=self,
            description="Prompts with pictures and their ranked responses; `media` row i belongs to `groups` row i.",
            # Every split shares one set of features: `groups` leaves `encoded` empty, `media` leaves `record` empty.
            features=tfds.features.FeaturesDict({"record": tfds.features.Text(), "encoded": pictures}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(self._stamp),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Callable[[], Any]]]:
        texts = [len(group.to_json()) for group in self._groups]
        return {
            "groups": [partial(self._texts, rows) for rows in _shards(texts)],
            "media": [partial(self._pictures, rows) for rows in _shards(self._byte_counts)],
        }

    def _texts(self, rows: range) -> Iterator[tuple[int, Example]]:
        for row in rows:
            yield row, {"record": self._groups[row].to_json(), "encoded": []}

    def _pictures(self, rows: range) -> Iterator[tuple[int, Example]]:
        loaded = _ahead(self._load, [self._groups[row] for row in rows], self._workers)
        for row, encoded in zip(rows, loaded, strict=True):
            yield row, {"record": "", "encoded": encoded}


def _shards(byte_counts: Sequence[int]) -> list[range]:
    """Runs of rows of about SHARD_BYTES each, in order; no run is empty."""
    shard_of = np.cumsum(np.asarray(byte_counts, np.int64)) // SHARD_BYTES
    starts = [0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(byte_counts)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def _ahead(load: Callable[[Group], list[bytes]], groups: Sequence[Group], workers: int) -> Iterator[list[bytes]]:
    """`map` on threads, at most `workers` results ahead of the reader: files in a bucket answer late."""
    waiting: deque[Future[list[bytes]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for group in groups:
            if len(waiting) == workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(load, group))
        while waiting:
            yield waiting.popleft().result()


def write_dataset(
    directory: epath.Path,
    groups: Sequence[Group],
    byte_counts: Sequence[int],
    load: Callable[[Group], list[bytes]],
    metadata: Mapping[str, Any],
    workers: int,
) -> epath.Path:
    """Write `groups` somewhere under `directory` and return the folder that is the dataset.

    `load` returns a group's encoded pictures, all of them, in order, and is called by `workers` threads;
    `byte_counts` is about how many bytes that is.
    """
    builder = PreparedGroups(
        groups=groups,
        byte_counts=byte_counts,
        load=load,
        metadata=metadata,
        workers=workers,
        data_dir=os.fspath(directory),
        file_format="array_record",
    )
    # TFDS announces a download on stdout; nothing is downloaded and stdout is the program's.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return epath.Path(builder.data_dir)


def read_metadata(directory: epath.Path) -> dict[str, Any] | None:
    """What `write_dataset` stored as metadata, or None where `directory` is no TFDS dataset."""
    if not (directory / INFO_FILE).exists():
        return None
    with _whole(directory):
        _check_description(directory)
        return dict(tfds.builder_from_directory(directory).info.metadata or {})


@contextlib.contextmanager
def _whole(path: str | epath.Path, row: str = "") -> Iterator[None]:
    """Names the dataset in whatever TFDS, ArrayRecord and protobuf raise on damaged files, which is a dozen types."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise DatasetError(f"{path}{row} is damaged ({said}): copy it again, or prepare it again") from error


def _check_description(directory: epath.Path) -> None:
    """TFDS imports the module that a feature names, opens the files that a template names, and reads other formats with
    TensorFlow: a dataset from elsewhere may name only what this program writes.

    Raises:
        ValueError, KeyError, TypeError: it names something else.
    """
    info = json.loads((directory / INFO_FILE).read_text())
    if info["fileFormat"] != "array_record" or info.get("alternativeFileFormats"):
        raise ValueError(f"its files are {str(info['fileFormat'])[:40]!r}, not 'array_record'")
    for split in info["splits"]:
        if (template := split["filepathTemplate"]) != _TEMPLATE:
            raise ValueError(f"a split has files named {str(template)[:80]!r}")
    pending = [json.loads((directory / "features.json").read_text())]
    while pending:
        feature = pending.pop()
        if isinstance(feature, dict):
            named = feature.get("pythonClassName", _FEATURES[0])
            if named not in _FEATURES or "python_class_name" in feature:
                raise ValueError(f"a feature of the class {str(named)[:80]!r}")
            pending += feature.values()
        elif isinstance(feature, list):
            raise ValueError("a list among its features")


def _group_of(record: bytes) -> Group:
    """The group that a record holds. Raises ValueError, KeyError, TypeError: it is none."""
    group = Group.from_json(record.decode())
    texts = [group.id, *(turn.text for turn in group.prompt), *(response.text for response in group.responses)]
    texts += [text for media in group.media for text in (media.path, media.sha256)]
    texts += [origin.file for origin in group.origins]
    texts += [text for each in group.responses for text in (each.reason, each.question) if text is not None]
    ratings = [rating for response in group.responses for rating in response.ratings]
    texts += [*group.facts, *(attribute for attribute, _ in ratings)]
    numbers = [response.score for response in group.responses] + [pair.margin for pair in group.pairs]
    numbers += [value for _, value in ratings]
    places = [place for pair in group.pairs for place in (pair.chosen, pair.rejected)]
    counts = [response.rank for response in group.responses] + [turn.media for turn in group.prompt] + places
    counts += [side for media in group.media for size in media.sizes for side in size]
    counts += [origin.line for origin in group.origins]
    if not all(isinstance(text, str) for text in texts) or not all(type(count) is int for count in counts):
        raise TypeError("a text or a number is none")
    if not all(number is None or math.isfinite(number) for number in numbers):
        raise ValueError("a score, rating or margin is not finite")
    if any(value is None for _, value in ratings):
        raise ValueError("a rating of nothing")
    if not all(0 <= place < len(group.responses) for place in places) or min(counts, default=0) < 0:
        raise ValueError("a pair of responses that are not there")
    if any(turn.role not in ("system", "user", "assistant") for turn in group.prompt):
        raise ValueError("a turn of nobody")
    if not group.one_prompt and not group.prompt:
        raise ValueError("an answer to a question in no turn")
    if any(media.kind not in ("image", "video") for media in group.media):
        raise ValueError("media of no kind")
    if sum(group.media_before()) != len(group.media):
        raise ValueError("media that stand in no turn")
    for text in texts:
        text.encode()  # a lone surrogate could be written nowhere
    return group


def upload_dataset(directory: epath.Path, target: epath.Path) -> None:
    """Put the dataset in the local `directory` under the remote `target`, where it is one only once it is whole."""
    storage.upload(Path(directory), target, last=INFO_FILE, marker=UPLOADING)


def _is_data(name: str) -> bool:
    """Whether TFDS reads the file `name` of a dataset: not the reports, nor what other programs put beside them."""
    return name in (INFO_FILE, "features.json", "metadata.json") or ".array_record" in name


class PreparedDataset:
    """Random access to prepared groups. Files are opened on first use, in each process for itself; picklable.

    `path` is where the dataset is and where its annotations are, also where the files read are a local copy.
    """

    def __init__(self, path: str):
        """Raises DatasetError unless `path` holds a whole prepared dataset of this format."""
        self.path = path
        self._files = os.fspath(storage.local_copy(path, _is_data)) if storage.is_remote(path) else path
        metadata = read_metadata(epath.Path(self._files))
        if metadata is None or "fingerprint" not in metadata:
            raise DatasetError(f"{path} is not a prepared dataset: make it with launch/prepare.py --output {path}")
        if metadata.get("format_version") != FORMAT_VERSION:
            raise DatasetError(
                f"{path} has format version {metadata.get('format_version')}, this program reads {FORMAT_VERSION}: "
                "prepare it again"
            )
        self.fingerprint: str = metadata["fingerprint"]
        self._splits: dict[str, Any] = {}
        groups, media = self._split("groups"), self._split("media")
        with _whole(path):
            self._length, pictures = len(groups), len(media)
        if pictures != self._length:
            raise DatasetError(f"{path} has unequal splits: it is damaged, prepare it again")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_splits": {}}

    def __len__(self) -> int:
        return self._length

    def group(self, row: int) -> Group:
        """Row `row` without picture bytes."""
        split = self._split("groups")
        with _whole(self.path, f" row {self._checked(row)}"):
            return _group_of(split[row]["record"])

    def groups(self) -> Iterator[Group]:
        """All rows in order, without picture bytes."""
        for start in range(0, self._length, SCAN_ROWS):
            rows = list(range(start, min(start + SCAN_ROWS, self._length)))
            split = self._split("groups")
            with _whole(self.path, f" row {start} or one after it"):
                read = [_group_of(example["record"]) for example in split.__getitems__(rows)]
            yield from read

    def with_media(self, row: int) -> Group:
        """Row `row` with the encoded bytes of every picture and frame.

        Raises:
            DatasetError: the bytes are not those the group was prepared with.
        """
        group = self.group(row)
        split = self._split("media")
        with _whole(self.path, f" row {row}"):
            encoded = [bytes(data) for data in split[row]["encoded"]]
        if len(encoded) != sum(len(media.sizes) for media in group.media):
            raise DatasetError(f"{self.path} row {row}: pictures are missing; it is damaged, prepare it again")
        remaining, filled = iter(encoded), []
        for media in group.media:
            own = tuple(itertools.islice(remaining, len(media.sizes)))
            if digest(own, media.kind) != media.sha256:
                raise DatasetError(f"{self.path} row {row}: {media.path!r} is damaged (sha256); prepare it again")
            filled.append(dataclasses.replace(media, encoded=own))
        return dataclasses.replace(group, media=tuple(filled))

    def parts(self) -> Iterator[tuple[PreparedDataset, dict[int, int]]]:
        """Itself, and each row -> that row: as a mixture yields its parts."""
        yield self, {row: row for row in range(self._length)}

    def _checked(self, row: int) -> int:
        if not 0 <= row < self._length:
            raise IndexError(f"{self.path} has rows 0..{self._length - 1}, not {row}")
        return row

    def _split(self, name: str) -> Any:
        if name not in self._splits:
            with _whole(self.path):
                self._splits[name] = tfds.builder_from_directory(self._files).as_data_source(name)
        return self._splits[name]
