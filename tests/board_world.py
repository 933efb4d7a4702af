"""The built-in world, rated, as a dataset of a few boards, and a model of some thousand parameters that sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from small_world import ROOT

from mmrlhf_jax.data.digit_boards.boards import CELL
from mmrlhf_jax.data.digit_boards.world import RATED_MAPPING, WorldConfig, read_questions, write_world
from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.data.sources.rows import SourceOptions
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.weights import new_directory
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.models.siglip.config import SiglipConfig

SIDE = 2  # rows and columns of a board: short answers, little to compile


@dataclass(frozen=True)
class BoardWorld:
    directory: Path
    dataset: str
    model: str
    groups: int


def make_board_world(directory: Path, boards: int = 8) -> BoardWorld:
    """Questions about boards with answers that are ranked, scored, rated and criticised, and with facts."""
    config = WorldConfig(boards, 1, side=SIDE, tasks=("board", "row", "unanswerable"), more=1, seed=1, rated=True)
    write_world(directory / "world", config)
    dataset, model = str(directory / "dataset"), str(directory / "model")
    report = prepare(
        PrepareOptions(
            source="mapped",
            inputs=(str(directory / "world" / "train.jsonl"),),
            output=dataset,
            media=str(directory / "world" / "media"),
            source_options=SourceOptions(dict(pair.split("=") for pair in RATED_MAPPING)),
        )
    )
    rows = read_questions(directory / "world", "train")
    template = (ROOT / "configs" / "quickstart" / "critique_template.txt").read_text()
    texts = [template, *(text for row in rows for text in (row["question"], *row["answers"], *row["reasons"]))]
    pixels = SIDE * CELL
    shape = LlavaOnevisionConfig(
        tower=SiglipConfig(embed=16, layers=1, heads=2, mlp=16, image_size=pixels, patch_size=CELL),
        decoder=Qwen2Config(
            embed=32, layers=2, heads=2, kv_heads=2, head_dim=16, mlp=32, rope_theta=1e4, tied=True, max_positions=256
        ),
        pinpoints=((pixels, pixels),),
    )
    new_directory(directory / "model", shape, texts=[*texts, "user", "assistant"], seed=0)
    return BoardWorld(directory, dataset, model, report.groups)
