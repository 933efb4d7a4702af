"""One self-contained HTML page about one run or several: curves, beta, calibration, answers, critiques, recipes.

    python launch/report.py RUN --output report.html
    python launch/report.py RUN RUN --answers before=sft.jsonl after=mm_dpo.jsonl --dataset HELD_OUT --output both.html

The page loads nothing and holds no script. What there is nothing for is left out, with the command that would make it.
A file of --answers is one that launch/generate.py wrote. Which of its claims are wrong stands, where somebody knows, in
a response's field "wrong": [[start, end], ...] or [[start, end, "what is right"], ...], ranges of characters of "text";
"missing": ["what is right", ...] are claims that were due and not made, "claims" is how many were due.

Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import tyro

from mmrlhf_jax import storage
from mmrlhf_jax.command import CommandError, UsageError, run_command
from mmrlhf_jax.groups import Group
from mmrlhf_jax.inference.prompts import read_prompts
from mmrlhf_jax.report.answers import read_answers
from mmrlhf_jax.report.datasets import find_datasets
from mmrlhf_jax.report.page import GENERATOR, MOST_RUNS, page
from mmrlhf_jax.report.pictures import Album, Prompts, album
from mmrlhf_jax.report.runs import read_runs
from mmrlhf_jax.report.sections import Material

HEAD_BYTES = 4096  # of a page, within which it names its generator
FRAMES = 10  # of a video file, of which the middle one is shown


@dataclass(frozen=True)
class Arguments:
    __doc__ = __doc__

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """RUN directories, local or gs://, finished or not; several are laid over each other"""
    output: str = "report.html"
    """the page, local or gs://; an earlier report is replaced, another file never"""
    answers: tuple[str, ...] = ()
    """files of answers to the same prompts, as FILE or LABEL=FILE, shown side by side in this order"""
    dataset: tuple[str, ...] = ()
    """prepared datasets or mixture files: the runs' own, where they have moved, and any others whose pictures and
    rewards are to be shown"""
    input: str | None = None
    """the prompts of --answers, where they were answered from a file, for their pictures"""
    media: str | None = None
    """root of all picture and video paths in --input"""
    shown: int = 12
    """prompts whose answers are shown, drawn by a hash of their names; half as many groups with critiques"""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="report.py")
    _check(arguments)
    _check_output(arguments.output)
    runs = read_runs(arguments.runs)
    answers = read_answers(arguments.answers)
    found = find_datasets(runs, arguments.dataset)
    with tempfile.TemporaryDirectory(prefix="mmrlhf-report-") as folder:
        sources: list[tuple[Prompts, Iterable[Group]]] = []
        if answers:
            sources += [(dataset, dataset.groups()) for dataset in found.datasets.values()]
        if arguments.input is not None:
            prompts = read_prompts(arguments.input, arguments.media, folder, frames=FRAMES, progress=True)
            if prompts.rejected:
                bad = [f"{row.origin}: {row.reason}" for row in prompts.rejected[:8]]
                many = f"{len(prompts.rejected)} of its rows cannot be shown"
                raise CommandError("\n  ".join([f"{arguments.input}: {many}", *bad]))
            sources.append((prompts, prompts.groups))
        pictures = album(sources) if sources else Album({})
        text = page(Material(runs, found, answers, pictures, arguments.shown))
    output = storage.to_path(arguments.output)
    if not storage.is_remote(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    storage.write_whole(output, text.encode())
    many = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"wrote {arguments.output}: {many}, {len(text.encode()) / 2**20:.1f} MiB")


def _check(arguments: Arguments) -> None:
    """Raises UsageError for a command line that contradicts itself."""
    if not arguments.runs:
        raise UsageError("name a RUN, a directory that launch/train.py made")
    if len(arguments.runs) > MOST_RUNS:
        raise UsageError(f"{len(arguments.runs)} runs are more than can be told apart: name at most {MOST_RUNS}")
    plain = [run.rstrip("/") for run in arguments.runs]
    if len(set(plain)) < len(plain):
        raise UsageError(f"{max(plain, key=plain.count)} is named twice")
    if arguments.shown < 1:
        raise UsageError(f"--shown {arguments.shown} is not positive")
    if arguments.input is not None and not arguments.answers:
        raise UsageError("--input has the prompts of --answers: give both")
    if arguments.media is not None and arguments.input is None:
        raise UsageError("--media is for --input: a dataset holds its pictures")


def _check_output(output: str) -> None:
    """Raises CommandError for a file that is no report of ours, before any work."""
    path = storage.to_path(output)
    if not path.exists():
        return
    if path.is_dir():
        raise CommandError(f"{output} is a directory: name a file, such as {output.rstrip('/')}/report.html")
    with storage.open_read(output) as stream:
        if GENERATOR.encode() not in stream.read(HEAD_BYTES):
            raise CommandError(f"{output} exists and is no report: choose another --output")


if __name__ == "__main__":
    run_command(main)
