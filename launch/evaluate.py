"""A benchmark: what a reward model prefers, or what a model answers.

    python launch/evaluate.py reward_bench --input mm_reward_bench.jsonl --output DIR
    python launch/evaluate.py reward_bench --model MODEL --input mm_reward_bench.jsonl --media MEDIA --output DIR
    python launch/evaluate.py vl_reward_bench --model MODEL --input test.parquet --output DIR
    python launch/evaluate.py pope --model MODEL --input coco_pope_random.json --media val2014/ --output DIR
    python launch/evaluate.py mmhal_bench --answers answers.jsonl --input mmhal.json --output DIR --judge.url URL
        --judge.model NAME
    python launch/evaluate.py calibration --input DIR/rows.jsonl --output OTHER

Reward benchmarks show a reward model beside random scores and beside preferring the longer answer; without --model only
these, and no picture is read. Benchmarks of answers (pope, chair, mmhal_bench, mad_bench, safety_bench, diversity,
final_answer) have MODEL answer, or measure --answers that are there. No judge is needed to run; one is asked over the
network only where --judge.url names it. calibration and generalisation_gap read what other evaluations left.

A table on stdout, DIR/results.json and DIR/rows.jsonl (one line a row of the input). One process, with all its devices.
The same command again resumes, or finds the work done. Exit codes: 0 done, 1 failed, 2 bad usage, 75 interrupted: run
again.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from mmrlhf_jax import storage
from mmrlhf_jax.command import UsageError, progress_line, read_arguments, run_command
from mmrlhf_jax.data.annotations import AnnotationStore
from mmrlhf_jax.data.media import MAX_FRAMES, MediaRoot
from mmrlhf_jax.data.rewards import REWARD, Critiques, read_rewards
from mmrlhf_jax.data.sources.pictures import PictureStore
from mmrlhf_jax.evaluation import answering, calibration, generalisation_gap, reward_bench, vl_reward_bench
from mmrlhf_jax.evaluation.answer_arguments import (
    AnswerArguments,
    Chair,
    Diversity,
    FinalAnswer,
    MadBench,
    MMHalBench,
    Pope,
    SafetyBench,
    check,
)
from mmrlhf_jax.evaluation.comparisons import (
    BenchmarkError,
    Comparison,
    Place,
    Scored,
    as_groups,
    check_lengths,
    check_reasons,
    cut_short,
    rewards_of,
    row_records,
    with_pictures,
)
from mmrlhf_jax.evaluation.results import Benchmark, Columns, Measured, figures, find_done, table, write
from mmrlhf_jax.groups import Group
from mmrlhf_jax.inference.engine import DecodeConfig, progress_bar
from mmrlhf_jax.inference.forward import ForwardConfig, GroupList
from mmrlhf_jax.inference.reading import ReadingConfig, key_of
from mmrlhf_jax.inference.reward import RewardModel, Scoring, write_rewards
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.inference.watch import Watch
from mmrlhf_jax.lease import lease
from mmrlhf_jax.models.critique_reward.render import RewardRenderer, load_reward_renderer
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.render import RenderOptions
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.model import absolute, check_family, load_model, model_fingerprint
from mmrlhf_jax.training.recipe import INFERENCE
from mmrlhf_jax.training.runtime import set_up_jax, stop_signals

READERS = 4  # threads that read and decode pictures
BENCHMARKS = {one.name: one for one in (reward_bench.BENCHMARK, vl_reward_bench.BENCHMARK)}


@dataclass(frozen=True)
class Arguments:
    input: str
    """the benchmark's rows: a JSON-lines, JSON-array or .parquet file"""
    output: str
    """directory of results.json and rows.jsonl"""
    model: str | None = None
    """a reward model: a Hugging Face directory, a hub id, or a RUN; without one only what needs none is computed"""
    media: str | None = None
    """root of all picture and video paths; paths that leave it are refused. Pictures that stand in rows need none."""
    critiques: Critiques | None = None
    """which critiques the scores are read behind. generated: the model's own (the default, of a model that writes any);
    human: the file's reasons; none: without (the default of a scalar model)"""
    samples: int = 1
    """critiques generated of each answer; the score is the mean of theirs"""
    template: str = ""
    """file with the template of a reward model that does not bring its own"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of activations and matrix products"""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    vocab_chunk: int = 8192
    """vocabulary rows whose logits exist at once"""
    max_frames: int = MAX_FRAMES
    """refuse directories of frames that hold more"""
    render: RenderOptions = field(default_factory=RenderOptions)
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    forward: Annotated[ForwardConfig, tyro.conf.arg(name="")] = field(default_factory=ForwardConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """how critiques are generated; changes none of them"""
    reading: Annotated[ReadingConfig, tyro.conf.arg(name="")] = field(default_factory=ReadingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class RewardBench(Arguments):
    """MM-RLHF-RewardBench (mm_reward_bench.jsonl): ACC and ACC+ by category. --render.frames 32 as the released scorer
    asks for."""


@dataclass(frozen=True)
class VLRewardBench(Arguments):
    """VL-RewardBench (its parquet file or data.jsonl, or r1_reward's): accuracy by group, overall and macro."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Expected calibration error: of confidences, or of the rewards that reward_bench leaves in rows.jsonl."""

    input: str
    """rows {confidence, right}, {rewards: [preferred, other]} or {margin}"""
    output: str
    """directory of results.json and rows.jsonl"""
    bins: int = 10
    """of equal width"""
    scale: float = 1.0
    """a margin m is the probability sigma(scale m)"""


@dataclass(frozen=True, kw_only=True)
class GeneralisationGap:
    """What a model loses out of distribution: two evaluations by one benchmark, compared."""

    input: str
    """output of the evaluation in distribution"""
    shifted: str
    """output of the one out of it"""
    output: str
    """directory of results.json"""


Chosen = (
    Annotated[RewardBench, tyro.conf.subcommand("reward_bench")]
    | Annotated[VLRewardBench, tyro.conf.subcommand("vl_reward_bench")]
    | Annotated[Pope, tyro.conf.subcommand("pope")]
    | Annotated[Chair, tyro.conf.subcommand("chair")]
    | Annotated[MMHalBench, tyro.conf.subcommand("mmhal_bench")]
    | Annotated[MadBench, tyro.conf.subcommand("mad_bench")]
    | Annotated[SafetyBench, tyro.conf.subcommand("safety_bench")]
    | Annotated[Diversity, tyro.conf.subcommand("diversity")]
    | Annotated[FinalAnswer, tyro.conf.subcommand("final_answer")]
    | Annotated[Calibration, tyro.conf.subcommand("calibration")]
    | Annotated[GeneralisationGap, tyro.conf.subcommand("generalisation_gap")]
)


def main() -> None:
    chosen = read_arguments(Chosen, prog="evaluate.py", description=__doc__.split("\n")[0])
    if isinstance(chosen, AnswerArguments):
        check(chosen)
        answering.run(chosen)
    elif isinstance(chosen, Calibration):
        _calibration(chosen)
    elif isinstance(chosen, GeneralisationGap):
        _gap(chosen)
    else:
        _reward_benchmark(chosen)


def _calibration(arguments: Calibration) -> None:
    if arguments.bins < 1:
        raise UsageError(f"--bins {arguments.bins} is not positive")
    if not 0 < arguments.scale < math.inf:
        raise UsageError(f"--scale {arguments.scale} is no positive number")
    settings = {
        "benchmark": "calibration",
        "input_sha256": answering.sha256_of(arguments.input),
        "bins": arguments.bins,
        "scale": arguments.scale,
    }
    if (found := find_done(arguments.output, settings)) is not None:
        answering.show_done(arguments.output, calibration.SHEET, found)
        return
    records = calibration.read(arguments.input, scale=arguments.scale)
    _write(arguments.output, calibration.SHEET, settings, calibration.measure(records, arguments.bins), records)


def _gap(arguments: GeneralisationGap) -> None:
    inside, outside = (generalisation_gap.read(path) for path in (arguments.input, arguments.shifted))
    sheet = generalisation_gap.sheet(inside["benchmark"])
    settings = {"benchmark": "generalisation_gap", "in": inside["settings"], "out": outside["settings"]}
    if (found := find_done(arguments.output, settings)) is not None:
        answering.show_done(arguments.output, sheet, found)
        return
    measured, remarks = generalisation_gap.measure(inside, outside), generalisation_gap.remarks(inside, outside)
    _write(arguments.output, sheet, settings, measured, [], remarks)


def _write(
    output: str,
    columns: Columns,
    settings: Mapping[str, Any],
    measured: Measured,
    records: Sequence[Mapping[str, Any]],
    remarks: Sequence[str] = (),
) -> None:
    systems = {"model": measured}
    results = {"benchmark": columns.title, "settings": settings, "remarks": list(remarks), "systems": systems}
    with _lease(output):
        write(output, results, records)
    print("\n".join([*table(columns, systems, remarks), f"rows and figures: {output}"]))


def _reward_benchmark(chosen: RewardBench | VLRewardBench) -> None:
    _check(chosen)
    benchmark = BENCHMARKS["reward_bench" if isinstance(chosen, RewardBench) else "vl_reward_bench"]
    settings = _settings(chosen, benchmark)
    if chosen.model is None:
        if _show_done(chosen, benchmark, settings):
            return
        with tempfile.TemporaryDirectory(prefix="mmrlhf-evaluate-") as folder:
            rows = benchmark.read(chosen.input, _store(folder))
        with _lease(chosen.output):
            _finish(chosen, benchmark, settings, rows, None)
        return
    set_up_jax(chosen.dtype)
    _with_model(chosen, benchmark, settings)


def _check(arguments: Arguments) -> None:
    for name in ("samples", "max_frames", "vocab_chunk"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is not positive")
    if arguments.model is None:
        bare = Arguments(arguments.input, arguments.output)
        changed = [
            one.name for one in dataclasses.fields(bare) if getattr(arguments, one.name) != getattr(bare, one.name)
        ]
        if changed:
            raise UsageError(f"--{changed[0].replace('_', '-')} (or one of its fields) is for --model")


def _settings(arguments: Arguments, benchmark: Benchmark) -> dict[str, Any]:
    """What the figures depend on and can be told before a model is loaded."""
    settings: dict[str, Any] = {
        "benchmark": benchmark.name,
        "input_sha256": answering.sha256_of(arguments.input),
        "model": None if arguments.model is None else absolute(arguments.model),
    }
    if arguments.model is None:
        return settings
    media = arguments.media
    settings["media"] = media if media is None or storage.is_remote(media) else os.path.abspath(media)
    if arguments.critiques is not None:
        settings["critiques"] = arguments.critiques
    return settings | {"dtype": arguments.dtype}


def _settings_of_model(judge: RewardModel, scoring: Scoring) -> dict[str, Any]:
    """What else they depend on. Batches, meshes and attention change nothing beyond rounding."""
    generated = scoring.critiques == "generated"
    return {
        "critiques": scoring.critiques,
        "samples": scoring.samples,
        "sampling": dataclasses.asdict(scoring.sampling) if generated else None,
        "model_fingerprint": model_fingerprint(judge.model.config, judge.model.params),
        "renderer_fingerprint": judge.renderer.fingerprint,
        **key_of(scoring.head_reading(judge)),
    }


def _store(folder: str) -> PictureStore:
    return PictureStore(storage.to_path(folder))


def _with_model(arguments: Arguments, benchmark: Benchmark, settings: dict[str, Any]) -> None:
    there = find_done(arguments.output, settings) is not None  # other settings are told before a model is loaded
    # bad pictures too are told before a model is loaded, which may take minutes
    rows, groups, places = ((), [], []) if there else _read_with_pictures(arguments, benchmark)
    judge = _judge(arguments)
    scoring = Scoring(
        arguments.critiques,
        arguments.samples,
        arguments.sampling,
        arguments.forward,
        arguments.decode,
        arguments.reading,
    ).of(judge)
    settings |= _settings_of_model(judge, scoring)
    if there:
        _show_done(arguments, benchmark, settings)  # or says what is different by now
        return
    generated = scoring.critiques == "generated"
    closing = len(judge.renderer.closing) if isinstance(judge.renderer, RewardRenderer) else 0
    check_lengths(groups, judge.renderer, (arguments.sampling.max_new_tokens + closing) * generated)
    source = GroupList(tuple(groups), arguments.input)
    with _lease(arguments.output):
        store = AnnotationStore.open(arguments.output, REWARD, settings)
        with stop_signals() as asked, progress_bar(shown=generated) as progress:
            write_rewards(source, groups, range(len(groups)), judge, scoring, store, Watch(asked.is_set, progress))
        scored = read_rewards(store, source)
        _finish(arguments, benchmark, settings, rows, (places, [scored[row] for row in range(len(groups))]))
        store.directory.parent.rmtree()  # everything stands in rows.jsonl now


def _lease(output: str) -> AbstractContextManager[None]:
    return lease(storage.to_path(output) / "lease.json", output)


def _read_with_pictures(
    arguments: Arguments, benchmark: Benchmark
) -> tuple[tuple[Comparison, ...], list[Group], list[Place]]:
    with tempfile.TemporaryDirectory(prefix="mmrlhf-evaluate-") as folder:
        rows = benchmark.read(arguments.input, _store(folder))
        if arguments.critiques == "human":
            check_reasons(rows)
        groups, places = as_groups(rows, human=arguments.critiques == "human")
        with_bytes = with_pictures(
            groups,
            _media_root(arguments),
            MediaRoot(folder),
            workers=READERS,
            progress=lambda items, total: progress_line(items, desc="media", total=total),
        )
    return rows, with_bytes, places


def _judge(arguments: Arguments) -> RewardModel:
    assert arguments.model is not None
    mesh = make_mesh(arguments.mesh)
    model = load_model(arguments.model, mesh, ShardingRules(), rates=INFERENCE)
    check_family(model, arguments.model, reward=True)
    renderer = load_reward_renderer(str(model.assets), arguments.render, template=arguments.template)
    compute = Compute(
        dtype=arguments.dtype,
        platform=mesh.devices.flat[0].platform,
        attention=arguments.attention,
        vocab_chunk=arguments.vocab_chunk,
        vocab_shards=mesh.shape["tensor"],
    )
    return RewardModel(model, renderer, mesh, compute)


def _media_root(arguments: Arguments) -> MediaRoot | None:
    if arguments.media is None:
        return None
    if not storage.to_path(arguments.media).is_dir():
        raise BenchmarkError(f"{arguments.media} is not a directory: correct --media")
    # of a video file just the frames the model is shown
    return MediaRoot(arguments.media, max_frames=arguments.max_frames, video_frames=arguments.render.frames)


def _show_done(arguments: Arguments, benchmark: Benchmark, settings: dict[str, Any]) -> bool:
    found = find_done(arguments.output, settings)
    if found is not None:
        lines = table(benchmark, found["systems"], found["remarks"])
        print("\n".join([f"done already: {arguments.output}", *lines]))
    return found is not None


def _finish(
    arguments: Arguments,
    benchmark: Benchmark,
    settings: dict[str, Any],
    rows: Sequence[Comparison],
    scores: tuple[Sequence[Place], Sequence[Scored]] | None,
) -> None:
    places, scored = scores or (as_groups(rows, human=False)[1], None)
    rewards = None if scored is None else rewards_of(rows, places, scored)
    systems = figures(benchmark, rows, rewards)
    remarks = [*benchmark.remarks(rows), *([] if scored is None else cut_short(scored))]
    results = {"benchmark": benchmark.title, "settings": settings, "remarks": remarks, "systems": systems}
    write(arguments.output, results, row_records(rows, places, scored))
    print("\n".join([*table(benchmark, systems, remarks), f"rows and figures: {arguments.output}"]))


if __name__ == "__main__":
    run_command(main)
