"""TRL's DPOTrainer on the rows we write back, loaded as its users load them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torchvision_shim import mend_torchvision

from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.write_back import write_back

mend_torchvision()
pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("trl")

import trl_peer  # noqa: E402 - imports torch

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> trl_peer.World:
    return trl_peer.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def loaded(world: trl_peer.World) -> Any:
    from datasets import load_dataset

    write_back(open_dataset(world.dataset), "trl", str(world.directory / "rows"))
    return load_dataset(str(world.directory / "rows"), split="train", cache_dir=str(world.directory / "cache"))


def test_datasets_reads_conversations_and_pictures(world: trl_peer.World, loaded: Any) -> None:
    from datasets import Image, List
    from PIL import Image as Pillow
    from trl import is_conversational

    assert loaded.features["images"] == List(Image())
    assert all(is_conversational(row) for row in loaded)

    def text(messages: list[dict[str, Any]]) -> str:
        (message,) = messages
        return message["content"][-1]["text"]

    expected = Counter((row["prompt"], row["chosen"], row["rejected"]) for row in world.rows)
    assert Counter(tuple(text(row[name]) for name in ("prompt", "chosen", "rejected")) for row in loaded) == expected
    names = {row["prompt"]: row.get("image", []) for row in world.rows}
    for row in loaded:
        theirs = [Pillow.open(world.media / name) for name in names[text(row["prompt"])]]
        assert [image.tobytes() for image in row["images"]] == [image.tobytes() for image in theirs]
        kinds = [part["type"] for part in row["prompt"][0]["content"]]
        assert kinds == ["image"] * len(theirs) + ["text"]


def test_trl_trains_on_them_as_on_the_rows_they_came_from(world: trl_peer.World, loaded: Any) -> None:
    setting = trl_peer.Setting()
    (one,) = trl_peer.train_theirs(world, setting, world.directory / "one").records
    (other,) = trl_peer.train_theirs(world, setting, world.directory / "other", dataset=loaded).records
    for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
        assert other[name] == pytest.approx(one[name], rel=1e-5), name
