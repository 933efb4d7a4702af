"""Compute something for every response of a dataset and store it beside the data.

    python launch/annotate.py --dataset DATASET --model MODEL --with reference
    python launch/annotate.py --dataset DATASET --model REWARD_MODEL --with reward
    python launch/annotate.py --dataset DATASET --with rule --rule FILE

The same command again resumes. Exit codes: 0 done, 1 failed, 2 bad usage, 75 interrupted: run again.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from jax.sharding import Mesh

from mmrlhf_jax.command import UsageError, read_arguments, run_command
from mmrlhf_jax.data.annotations import AnnotationStore
from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.rewards import REWARD, Critiques, cut_short, note_command, read_rewards, write_readable
from mmrlhf_jax.data.rules import read_rule, write_scores_by_rule
from mmrlhf_jax.inference.engine import DecodeConfig, progress_bar
from mmrlhf_jax.inference.forward import ForwardConfig
from mmrlhf_jax.inference.layout import in_layout
from mmrlhf_jax.inference.reading import ReadingConfig, key_of
from mmrlhf_jax.inference.reference import write_reference_logps
from mmrlhf_jax.inference.reward import RewardModel, Scoring, write_rewards
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.inference.watch import Watch
from mmrlhf_jax.lease import lease
from mmrlhf_jax.models.critique_reward.render import load_reward_renderer, shows_facts
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.models.llava_onevision.render import RenderOptions, load_renderer
from mmrlhf_jax.nn.resharding import Layout
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.data import REFERENCE, reference_key
from mmrlhf_jax.training.distributed import (
    AgreedStop,
    check_agreement,
    is_speaker,
    job_lease,
    join_processes,
    say,
    wait_for_all,
)
from mmrlhf_jax.training.model import absolute, check_family, load_model, model_fingerprint
from mmrlhf_jax.training.peers import StuckConfig, set_limits, watched_processes
from mmrlhf_jax.training.recipe import INFERENCE
from mmrlhf_jax.training.runtime import set_up_jax, stop_signals


@dataclass(frozen=True)
class Arguments:
    """Reference log-probs, or rewards, of every response under MODEL or by a rule, stored beside DATASET, or beside
    each part of a mixture. The same command again resumes."""

    dataset: str
    """a directory made by launch/prepare.py, or a mixture file: of each of its parts the rows it takes"""
    what: Annotated[Literal["reference", "reward", "rule"], tyro.conf.arg(name="with")]
    """reference: per-token log-probs of every response; reward: a critique and a score of every response; rule: a score
    by --rule, read like those of a reward model"""
    model: str = ""
    """a Hugging Face directory, a hub id, or a RUN; with reward: of a reward model; with rule: none"""
    rule: str = ""
    """rule: the file that says which answers of a conversation go together (its format: mmrlhf_jax/data/rules.py)"""
    critiques: Critiques | None = None
    """reward: which critiques the scores are read behind. generated: the model's own (the default, of a model that
    writes any); human: the dataset's; none: without (the default of a scalar model)"""
    samples: int = 1
    """reward: critiques generated of each response; the score is the mean of theirs"""
    template: str = ""
    """reward: file with the template of a reward model that does not bring its own"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of activations and matrix products; a run reads log-probs made with its own compute.dtype"""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    vocab_chunk: int = 8192
    """vocabulary rows whose logits exist at once"""
    render: RenderOptions = field(default_factory=RenderOptions)
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    forward: Annotated[ForwardConfig, tyro.conf.arg(name="")] = field(default_factory=ForwardConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """how critiques are generated; changes none of them"""
    reading: Annotated[ReadingConfig, tyro.conf.arg(name="")] = field(default_factory=ReadingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    layout: Layout = "split"
    """reward: where parameters lie while critiques are decoded, as launch/generate.py has it"""
    stuck: StuckConfig = field(default_factory=StuckConfig)


def main() -> None:
    arguments = read_arguments(Arguments, prog="annotate.py")
    _check(arguments)
    if arguments.what == "rule":
        _by_rule(arguments)
        return
    join_processes()
    set_up_jax(arguments.dtype)
    annotate = _reward if arguments.what == "reward" else _reference
    with watched_processes(), stop_signals() as asked:
        set_limits(arguments.stuck)
        dataset = open_dataset(arguments.dataset)
        mesh = make_mesh(arguments.mesh)
        compute = Compute(
            dtype=arguments.dtype,
            platform=mesh.devices.flat[0].platform,
            attention=arguments.attention,
            vocab_chunk=arguments.vocab_chunk,
            vocab_shards=mesh.shape["tensor"],
        )
        agreed = AgreedStop(mesh)
        annotate(arguments, list(dataset.parts()), mesh, compute, lambda: agreed(asked.is_set()))


def _check(arguments: Arguments) -> None:
    """Raises UsageError for options that the annotation asked for would not read, or that it lacks."""
    by_rule = arguments.what == "rule"
    if by_rule != bool(arguments.rule):
        raise UsageError("--with rule needs --rule FILE" if by_rule else "--rule is for --with rule")
    if by_rule and arguments != Arguments(arguments.dataset, "rule", rule=arguments.rule):
        raise UsageError("--with rule reads --dataset and --rule alone: leave out the others")
    for name in ("samples", "vocab_chunk"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is not positive")
    if not by_rule and not arguments.model:
        raise UsageError(f"--with {arguments.what} needs --model MODEL")
    if arguments.what != "reference":
        return
    bare = Arguments(arguments.dataset, "reference", arguments.model)
    for name in ("critiques", "samples", "template", "sampling", "decode", "layout", "reading"):
        if getattr(arguments, name) != getattr(bare, name):
            raise UsageError(f"--{name} (or one of its fields) is for --with reward")


Parts = list[tuple[PreparedDataset, dict[int, int]]]
Stop = Callable[[], bool]


def _reference(arguments: Arguments, parts: Parts, mesh: Mesh, compute: Compute, stop: Stop) -> None:
    model = load_model(arguments.model, mesh, ShardingRules(), rates=INFERENCE)
    check_family(model, arguments.model, reward=False)
    renderer = load_renderer(str(model.assets), arguments.render)
    key = reference_key(model_fingerprint(model.config, model.params), renderer, arguments.dtype)
    for part, row_of in parts:
        rows, store = set(row_of.values()), _open(part, REFERENCE, key)
        watch = Watch(stop)
        with job_lease(store.lease, str(store.directory)):
            written = write_reference_logps(part, rows, renderer, model, store, mesh, compute, arguments.forward, watch)
        _say(written, rows, store)


def _reward(arguments: Arguments, parts: Parts, mesh: Mesh, compute: Compute, stop: Stop) -> None:
    model = load_model(arguments.model, mesh, ShardingRules(), rates=INFERENCE)
    check_family(model, arguments.model, reward=True)
    renderer = load_reward_renderer(str(model.assets), arguments.render, template=arguments.template)
    fingerprint = model_fingerprint(model.config, model.params)
    judge = RewardModel(in_layout(model, arguments.layout, mesh), renderer, mesh, compute)
    scoring = Scoring(
        arguments.critiques,
        arguments.samples,
        arguments.sampling,
        arguments.forward,
        arguments.decode,
        arguments.reading,
    ).of(judge)
    generated = scoring.critiques == "generated"
    key = {
        **reference_key(fingerprint, renderer, arguments.dtype),
        "critiques": scoring.critiques,
        "samples": scoring.samples,
        "sampling": dataclasses.asdict(scoring.sampling) if generated else None,
        **key_of(scoring.head_reading(judge)),
        **({"facts": True} if shows_facts(renderer) else {}),
    }
    for part, row_of in parts:
        rows, store = set(row_of.values()), _open(part, REWARD, key)
        with job_lease(store.lease, str(store.directory)):
            if is_speaker():
                note_command(store, absolute(arguments.model), shlex.join(["python", *sys.argv]))
            with progress_bar(shown=generated and is_speaker()) as progress:
                written = write_rewards(part, list(part.groups()), rows, judge, scoring, store, Watch(stop, progress))
            if is_speaker():
                write_readable(store, part)
        _say(written, rows, store)
        if generated:
            cut, critiques = cut_short(read_rewards(store, part).values())
            say(*[f"note: {cut} of {critiques} critiques were cut short: raise --max-new-tokens"] * bool(cut))


def _by_rule(arguments: Arguments) -> None:
    """Needs no device, and no other process."""
    rule, name = read_rule(arguments.rule)
    key = {"rule": name, "critiques": "none", "samples": 1, **({"facts": True} if rule.truth else {})}
    for part, row_of in open_dataset(arguments.dataset).parts():
        rows, store = set(row_of.values()), AnnotationStore.open(part.path, REWARD, key)
        with lease(store.lease, str(store.directory)):
            note_command(store, f"the rule {arguments.rule}", shlex.join(["python", *sys.argv]))
            written = write_scores_by_rule(part, list(part.groups()), rows, rule, store)
            write_readable(store, part)
        _say(written, rows, store)


def _open(part: PreparedDataset, kind: str, key: dict[str, Any]) -> AnnotationStore:
    check_agreement("model, dataset or options", json.dumps([part.fingerprint, key], sort_keys=True))
    if is_speaker():
        AnnotationStore.open(part.path, kind, key)  # creates it: once
    wait_for_all("the store is there")
    return AnnotationStore.open(part.path, kind, key)


def _say(written: int, rows: set[int], store: AnnotationStore) -> None:
    done = "done already" if not written else f"{written} groups scored"
    say(f"{done}: {len(rows)} stored in {store.directory}")


if __name__ == "__main__":
    run_command(main)
