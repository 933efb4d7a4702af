from __future__ import annotations

import itertools
import json
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import picture, row, write_media, write_rows
from small_world import ROOT, make_small_world, metrics, run

from mmrlhf_jax.data.annotations import AnnotationStore, find
from mmrlhf_jax.data.dataset import DatasetError
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.mixture import MixtureError, open_mixture
from mmrlhf_jax.data.prepare import PrepareOptions, prepare


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vqa`: ten groups with pictures, ids short/0 to long/9; `chat`: seven of text, ids 0 to 6."""
    home = tmp_path_factory.mktemp("mixtures")
    media = write_media(home / "media", cats__1=picture(), dogs__1=picture(size=(20, 10)))
    rows = {
        "vqa": [row(id=f"{'short' if i < 6 else 'long'}/{i}", image=f"{'cats' if i % 2 else 'dogs'}/1.png")
                for i in range(10)],
        "chat": [row(id=str(i), image=None, prompt=f"Question {i}?") for i in range(7)],
    }  # fmt: skip
    for name, given in rows.items():
        file = write_rows(home / f"{name}.jsonl", given)
        where = str(media) if name == "vqa" else None
        prepare(PrepareOptions(source="mm_rlhf", inputs=(file,), output=str(home / name), media=where))
    return home


@pytest.fixture
def mix(home: Path) -> Callable[..., str]:
    def mix(*parts: Any, name: str = "mixture.json", **top: Any) -> str:
        (home / name).write_text(json.dumps({"parts": list(parts), **top}))
        return str(home / name)

    return mix


def part(dataset: str, **keys: Any) -> dict[str, Any]:
    return {"dataset": dataset, **keys}


def ids(path: str) -> list[str]:
    return [group.id for group in open_dataset(path).groups()]


VQA = [f"short/{i}" for i in range(6)] + [f"long/{i}" for i in range(6, 10)]
CHAT = [str(i) for i in range(7)]


# Which rows.


def test_parts_follow_one_another(mix: Any) -> None:
    assert ids(mix(part("vqa"), part("chat"))) == VQA + CHAT


@pytest.mark.parametrize("weight", [0.3, 0.5, 1, 1.0, 2.7, 3])
def test_a_row_is_seen_as_often_as_its_weight_says(mix: Any, weight: float) -> None:
    seen = Counter(ids(mix(part("vqa", weight=weight), part("chat"))))
    often = [seen[name] for name in VQA]
    assert sum(often) == round(10 * weight)
    assert set(often) <= {int(weight), int(weight) + 1}
    assert [seen[name] for name in CHAT] == [1] * 7


def test_a_limit_takes_the_first_rows_of_the_subset(mix: Any) -> None:
    assert ids(mix(part("vqa", limit=3), part("chat", limit=100))) == VQA[:3] + CHAT
    assert ids(mix(part("vqa", subset="long/*", limit=2))) == ["long/6", "long/7"]


def test_a_subset_is_a_glob_on_ids_and_media_paths(mix: Any) -> None:
    assert ids(mix(part("vqa", subset="short/*"))) == VQA[:6]
    assert ids(mix(part("vqa", subset="cats/*.png"))) == [f"short/{i}" for i in (1, 3, 5)] + ["long/7", "long/9"]
    assert ids(mix(part("vqa", subset="*[24]"))) == ["short/2", "short/4"]
    with pytest.raises(MixtureError, match="matches neither an id nor a media path"):
        open_dataset(mix(part("vqa", subset="SHORT/*")))


def test_two_subsets_of_a_dataset_have_weights_of_their_own(mix: Any) -> None:
    path = mix(part("vqa", subset="short/*", weight=2), part("chat"), part("vqa", subset="long/*"))
    assert Counter(ids(path)) == {**dict.fromkeys(VQA[:6], 2), **dict.fromkeys(VQA[6:] + CHAT, 1)}
    assert [data.path for data, _ in open_dataset(path).parts()] == [
        str(Path(path).parent / n) for n in ("vqa", "chat")
    ]


# Again and again the same.


class Ten:
    """As much of a dataset as choosing rows asks for; its fingerprint is the same on every machine."""

    fingerprint = "f"
    path = "ten"

    def __len__(self) -> int:
        return 10


@pytest.mark.parametrize(("seed", "rows"), [(0, [1, 4, 5]), (1, [5, 7, 9])])
def test_the_selection_is_the_same_on_every_machine(mix: Any, seed: int, rows: list[int]) -> None:
    """The smallest of sha256("SEED f ROW"), computed by other means (sha256sum, sort)."""
    ((_, chosen),) = open_mixture(mix(part("vqa", weight=0.3), seed=seed), lambda path: Ten()).parts()
    assert chosen == dict(enumerate(rows))


def test_a_mixture_is_the_same_each_time(mix: Any) -> None:
    path = mix(part("vqa", weight=0.5), part("chat", weight=1.4), seed=3)
    once, again = open_dataset(path), open_dataset(path)
    assert [group.to_json() for group in once.groups()] == [group.to_json() for group in again.groups()]
    assert once.fingerprint == again.fingerprint


def test_the_order_of_parts_does_not_change_which_rows_are_chosen(mix: Any) -> None:
    vqa, chat = part("vqa", weight=0.5), part("chat", weight=1.4)
    one, other = ids(mix(vqa, chat)), ids(mix(chat, vqa))
    assert one != other
    assert sorted(one) == sorted(other)
    assert sorted(ids(mix(vqa))) == sorted(set(one) & set(VQA))


def test_a_larger_weight_keeps_the_rows_of_a_smaller_one(mix: Any) -> None:
    chosen = [set(ids(mix(part("vqa", weight=weight / 10)))) for weight in range(1, 11)]
    assert all(few < more for few, more in itertools.pairwise(chosen))


def test_a_seed_chooses_other_rows(mix: Any) -> None:
    assert len({tuple(ids(mix(part("vqa", weight=0.5), seed=seed))) for seed in range(5)}) > 1


def test_the_fingerprint_changes_with_all_that_changes_rows_and_only_with_that(mix: Any, home: Path) -> None:
    (home / "elsewhere").mkdir(exist_ok=True)
    base = open_dataset(mix(part("vqa"), part("chat"))).fingerprint
    others = [
        mix(part("vqa"), part("chat"), seed=1),
        mix(part("vqa", weight=2), part("chat"), name="2.json"),
        mix(part("vqa", limit=9), part("chat"), name="3.json"),
        mix(part("vqa", subset="*/*"), part("chat"), name="4.json"),
        mix(part("chat"), part("vqa"), name="5.json"),
    ]
    assert len({base, *(open_dataset(path).fingerprint for path in others)}) == 6
    for same in (
        mix(part("vqa", weight=1, limit=None, subset=None), part("chat"), seed=0),
        mix(part(str(home / "vqa")), part(str(home / "chat"))),
        mix(part("../vqa"), part("../chat"), name="elsewhere/mixture.json"),
    ):
        assert open_dataset(same).fingerprint == base


# Used as a dataset.


def test_a_mixture_is_read_like_a_dataset(mix: Any) -> None:
    path = mix(part("chat", weight=2, limit=2), part("vqa", subset="long/*"))
    data = open_dataset(path)
    assert data.path == path
    assert len(data) == 8
    assert [data.group(i) for i in range(8)] == list(data.groups())
    whole = [data.with_media(i) for i in range(8)]
    assert [len(group.media) for group in whole] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert whole[4].media[0].encoded == (picture(size=(20, 10)),)
    with pytest.raises(IndexError, match=r"mixture.json has rows 0\.\.7, not 8"):
        data.with_media(8)


def test_an_open_mixture_travels_to_another_process(mix: Any) -> None:
    data = open_dataset(mix(part("vqa"), part("chat")))
    data.with_media(0)  # opens files
    assert pickle.loads(pickle.dumps(data)).with_media(3) == data.with_media(3)


def test_parts_say_which_row_is_which(mix: Any) -> None:
    data = open_dataset(mix(part("chat", weight=2, limit=2), part("vqa", subset="long/*")))
    (chat, chat_rows), (vqa, vqa_rows) = data.parts()
    assert chat_rows == {0: 0, 1: 1, 2: 0, 3: 1}
    assert vqa_rows == {4: 6, 5: 7, 6: 8, 7: 9}
    assert all(data.group(row) == vqa.group(own) for row, own in vqa_rows.items())
    ((itself, rows),) = chat.parts()
    assert itself is chat
    assert rows == {i: i for i in range(7)}


# Refusals.

BAD = {
    "[]": r"is not an object with the keys seed, parts",
    "{": r"mixture.json is not a mixture file: Expecting",
    '{"parts": [], "parts": []}': r"a key stands twice among parts, parts",
    "{}": r"lacks the key 'parts'",
    '{"parts": []}': r"parts is not a list of at least one part",
    '{"parts": {}}': r"parts is not a list of at least one part",
    '{"parts": ["vqa"]}': r"part 1 is not an object with the keys dataset, weight, limit, subset",
    '{"parts": [{"dataset": "vqa"}], "sed": 1}': r"has the unknown key 'sed'; known are seed, parts",
    '{"parts": [{"dataset": "vqa"}], "seed": -1}': r"seed -1 is not a whole number from 0 on",
    '{"parts": [{"dataset": "vqa"}], "seed": true}': r"seed True is not a whole number from 0 on",
    '{"parts": [{"dataset": "vqa"}, {"weight": 1}]}': r"part 2 lacks the key 'dataset'",
    '{"parts": [{"dataset": "vqa", "wieght": 1}]}': r"part 1 has the unknown key 'wieght'",
    '{"parts": [{"dataset": 3}]}': r"part 1: dataset 3 is not a path",
    '{"parts": [{"dataset": "vqa", "weight": 0}]}': r"part 1 \(vqa\): weight 0 is not a number over 0, of at most 1000",
    '{"parts": [{"dataset": "vqa", "weight": -1}]}': r"weight -1 is not a number over 0",
    '{"parts": [{"dataset": "vqa", "weight": NaN}]}': r"weight nan is not a number over 0",
    '{"parts": [{"dataset": "vqa", "weight": 1e9}]}': r"weight 1000000000.0 is not a number over 0, of at most 1000",
    '{"parts": [{"dataset": "vqa", "weight": "2"}]}': r"weight '2' is not a number over 0",
    '{"parts": [{"dataset": "vqa", "weight": null}]}': r"weight None is not a number over 0",
    '{"parts": [{"dataset": "vqa", "limit": 0}]}': r"limit 0 is neither null nor a whole number from 1 on",
    '{"parts": [{"dataset": "vqa", "limit": 2.0}]}': r"limit 2.0 is neither null nor a whole number",
    '{"parts": [{"dataset": "vqa", "subset": ""}]}': r"subset '' is neither null nor a glob",
    '{"parts": [{"dataset": "vqa"}, {"dataset": "./vqa", "weight": 2}]}': r"part './vqa' stands there twice: keep one",
    '{"parts": [{"dataset": "vqa", "subset": "s*"}, {"dataset": "vqa", "subset": "s*", "limit": 1}]}': (
        r"part 'vqa' with subset 's\*' stands there twice: keep one, add up the weights"
    ),
    '{"parts": [{"dataset": "gone"}]}': r"part 'gone': .*gone is not a prepared dataset: make it with",
    '{"parts": [{"dataset": "media"}]}': r"part 'media': .*media is not a prepared dataset: make it with",
    '{"parts": [{"dataset": "mixture.json"}]}': r"part 'mixture.json' is a file; a part is a dataset made by",
    '{"parts": [{"dataset": "vqa", "subset": "x*"}]}': (
        r"part 'vqa': subset 'x\*' matches neither an id nor a media path of its 10 groups \(the first id"
    ),
    '{"parts": [{"dataset": "vqa", "weight": 0.04}]}': r"weight 0.04 of 10 rows leaves none; raise the weight or leave",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_mixture_is_refused_by_name(home: Path, text: str) -> None:
    path = home / "mixture.json"
    path.write_text(text)
    with pytest.raises(MixtureError, match=BAD[text]) as caught:
        open_dataset(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(home: Path) -> None:
    (home / "mixture.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MixtureError, match=r"mixture.json is not a mixture file"):
        open_dataset(home / "mixture.json")


def test_copies_of_a_dataset_are_refused(mix: Any, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "vqa", tmp_path / "copy")
    with pytest.raises(MixtureError, match="are copies of one dataset: name only one of them"):
        open_dataset(mix(part("vqa"), part(str(tmp_path / "copy"), subset="long/*")))


def test_no_path_at_all_is_no_dataset(home: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist: a dataset is a directory made by"):
        open_dataset(home / "nothing.json")


# Annotated and trained on.


@pytest.mark.slow
def test_a_mixture_trains_on_log_probs_stored_beside_its_parts(small_world: Any, tmp_path: Path) -> None:
    other = make_small_world(tmp_path / "other", groups=5)
    parts = [part(small_world.dataset, weight=1.5, limit=6), part("other/dataset", weight=2)]
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"parts": parts}))
    common = ("--model", small_world.model, "--dataset", path)
    train = ("train", ROOT / "configs" / "tiny.py", *common, "--reference", "stored", "--output")
    with pytest.raises(AssertionError, match=rf"no reference log-probs.*Make them: python launch/annotate.py .*{path}"):
        run(*train, tmp_path / "too-early")
    annotate = ("annotate", *common, "--with", "reference", "--dtype", "float32")
    said = run(*annotate)
    assert re.findall(r"\d+ groups scored: \d+ stored", said) == [
        "6 groups scored: 6 stored",
        "5 groups scored: 5 stored",
    ]
    assert run(*annotate).count("done already") == 2
    assert not (tmp_path / "annotations").exists()
    (store,) = find(other.dataset, "reference")
    assert AnnotationStore.open(other.dataset, "reference", store.key).read(open_dataset(other.dataset)).keys() == {
        0, 1, 2, 3, 4
    }  # fmt: skip

    for name in ("once", "again"):
        run(*train, tmp_path / name)
    once, again = (metrics(tmp_path / name) for name in ("once", "again"))
    assert sorted(row for record in once for row in record["rows"]) == list(range(6 + 3 + 2 * 5))
    steady = [[{k: v for k, v in r.items() if "second" not in k} for r in records] for records in (once, again)]
    assert steady[0] == steady[1]
    assert len(once) == 3
    # every row got the log-probs of its own part's row: the policy starts as its reference
    assert once[0]["loss/preference"] == pytest.approx(np.log(2), abs=1e-5)
