"""Write a DATASET's pairs as rows of another trainer: python launch/export_data.py DATASET --as trl --output DIR

Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from mmrlhf_jax.command import run_command
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.write_back import Format, write_back


@dataclass(frozen=True)
class Arguments:
    """Write a DATASET's pairs, one a row and its pictures with it, as other trainers read them.

    Reasons, scores, ties and responses in no pair have no place in such rows; they are counted, not written. Such
    rows say nothing of two responses that are in no pair together: read again, those of one rank are a tie. Groups that
    the format would misread are refused.
    """

    dataset: Annotated[str, tyro.conf.Positional]
    """what launch/prepare.py wrote, or a mixture file"""
    output: str
    """the directory to make; it appears only when whole"""
    form: Annotated[Format, tyro.conf.arg(name="as")]
    """trl: train.parquet, TRL's conversations with images, which datasets.load_dataset(OUTPUT) reads;
    sharegpt: a dataset_dir of LLaMA-Factory, its rows in preferences.jsonl.
    launch/prepare.py reads both again, as the --source of that name."""
    skip_videos: bool = False
    """leave out groups with a video; otherwise they are refused, since the rows hold pictures only"""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="export_data.py")
    dataset = open_dataset(arguments.dataset)
    written = write_back(dataset, arguments.form, arguments.output, skip_videos=arguments.skip_videos, progress=True)
    print(
        f"{arguments.output} is written already" if written.reused else f"wrote {arguments.output} ({arguments.form})"
    )
    print("\n".join(written.chosen.lines()))


if __name__ == "__main__":
    run_command(main)
