"""The whole pipeline on a laptop CPU: a small model learns to read boards of real handwritten digits, and MM-DPO
teaches it not to claim what is not there.

    python launch/quickstart.py --output runs/quickstart

Needs `pip install 'mmrlhf-jax[quickstart]'`; downloads nothing. Every stage is a program a user calls, printed before
it runs: prepare, train (SFT on answers of mixed quality), annotate (reference log-probs), train (MM-DPO and, beside it,
SFT on the best answers for as many steps), export. At the end a table says how often each policy claims what is wrong,
and how well it prefers the better of two answers, on boards of digits it never saw. It runs on the CPU unless
JAX_PLATFORMS says otherwise. The same command again resumes; finished stages are not run again. Exit codes: 0 done,
1 failed, 2 bad usage, 75 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import tyro

from mmrlhf_jax.command import CommandError, UsageError, run_command
from mmrlhf_jax.data.sources import digit_boards
from mmrlhf_jax.data.sources.digit_boards import WorldConfig

LAUNCH = Path(__file__).resolve().parent
RECIPES = LAUNCH.parent / "configs" / "quickstart"
POLICIES = {"sft": "SFT (before)", "sft_best": "SFT on the best", "mm_dpo": "MM-DPO"}
MULTIPLE = 16  # prompts are short: padding to 128 would be most of the work
MOST_TOKENS = 24  # of an answer; the longest right one has 14


@dataclass(frozen=True)
class Arguments:
    """A small model learns to read boards of handwritten digits, and MM-DPO teaches it not to claim what is not
    there."""

    output: str = "runs/quickstart"
    """directory of everything that is made; the same command again resumes"""
    boards: int = WorldConfig.train_boards
    """boards to train on, two questions each"""
    held_out_boards: int = WorldConfig.held_out_boards
    """boards of other digits to evaluate on, two questions each"""
    sft_steps: int | None = None
    """steps of supervised fine-tuning; the recipe's by default"""
    preference_steps: int | None = None
    """steps of MM-DPO and of its control; the recipes' by default"""
    seed: int = 0
    """of the world, the model's weights and the order of the data"""

    def __post_init__(self) -> None:
        for name in ("boards", "held_out_boards", "sft_steps", "preference_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")


@dataclass(frozen=True)
class Stages:
    """The stages of one quickstart; each leaves what it took in OUTPUT/stages/ and is run once."""

    output: Path

    def program(self, name: str, product: Path, program: str, *arguments: object) -> None:
        """Runs launch/`program`.py as a user would, unless it has been."""
        command = [sys.executable, str(LAUNCH / f"{program}.py"), *map(str, arguments)]
        self.call(name, product, lambda: _run(name, command))

    def call(self, name: str, product: Path, work: Callable[[], object]) -> None:
        """Does `work`, which makes `product`, unless it has been done."""
        record = self.output / "stages" / f"{name}.json"
        if record.exists() and product.exists():
            print(f"[{name}] done already")
            return
        print(f"[{name}] {product}", flush=True)
        with _taken() as taken:
            work()
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps(taken) + "\n")

    def taken(self) -> dict[str, dict[str, float]]:
        """Seconds and CPU seconds of every stage, in order."""
        records = sorted((self.output / "stages").iterdir(), key=lambda file: file.stat().st_mtime)
        return {record.stem: json.loads(record.read_text()) for record in records}


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    signal.signal(signal.SIGTERM, _stop)
    arguments = tyro.cli(Arguments, prog="quickstart.py", description=__doc__)
    output = Path(arguments.output)
    _claim(output, arguments)
    stages, world = Stages(output), output / "world"
    config = WorldConfig(arguments.boards, arguments.held_out_boards, seed=arguments.seed)
    stages.call("world", world, lambda: digit_boards.write_world(world, config))
    stages.call("model", output / "model", lambda: _new_model(output / "model", world, config, arguments.seed))
    for split in digit_boards.SPLITS:
        stages.program(
            f"prepare_{split}", output / "data" / split, "prepare", "--source", "mapped",
            "--input", world / f"{split}.jsonl", "--media", world / "media", "--map", *digit_boards.MAPPING,
            "--model", output / "model", "--output", output / "data" / split,
        )  # fmt: skip
    _train(stages, "sft", output / "model", arguments.sft_steps, arguments.seed)
    _annotate(stages, "train", "sft")
    for policy in ("mm_dpo", "sft_best"):
        _train(stages, policy, output / "sft", arguments.preference_steps, arguments.seed)
    for policy in POLICIES:
        _annotate(stages, "held_out", policy)
    exported = output / "mm_dpo_hf"
    stages.program("export", exported, "export", output / "mm_dpo", "--output", exported, "--dtype", "float32")
    results = output / "results.json"
    stages.call("evaluate", results, lambda: _evaluate(output, results))
    print("\n".join(_table(json.loads(results.read_text()), stages.taken(), exported)))


def _claim(output: Path, arguments: Arguments) -> None:
    """Makes OUTPUT this quickstart's, or raises UsageError where it is something else's."""
    stated = json.dumps({k: v for k, v in dataclasses.asdict(arguments).items() if k != "output"}, indent=2) + "\n"
    file = output / "quickstart.json"
    if file.exists() and file.read_text() != stated:
        raise UsageError(f"{output} was made with other options (see {file}): name another --output or remove it")
    if output.exists() and not file.exists() and any(output.iterdir()):
        raise UsageError(f"{output} exists and holds no quickstart: name another --output")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(stated)


def _stop(number: int, _: FrameType | None) -> None:
    raise CommandError("interrupted; run the same command to go on", 75)


def _run(name: str, command: list[str]) -> None:
    print("  python " + " ".join(command[1:]), flush=True)
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    except BaseException:  # stopped: so is the program, which saves what it has
        process.terminate()
        process.wait()
        raise
    if status:
        raise CommandError(f"stage {name} ended with exit code {status}, see above", 75 if status == 75 else 1)


@contextmanager
def _taken() -> Iterator[dict[str, float]]:
    """Filled on leaving: wall and CPU seconds of what ran within, programs included."""
    taken: dict[str, float] = {}
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield taken
    taken |= {"seconds": time.perf_counter() - wall, "cpu_seconds": _cpu_seconds() - cpu, "peak_gib": _peak_gib()}


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_gib() -> float:
    """Largest resident memory any program of this quickstart has had so far."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / unit


def _train(stages: Stages, policy: str, model: Path, steps: int | None, seed: int) -> None:
    run = stages.output / policy
    flags = ["--model", model, "--dataset", stages.output / "data" / "train", "--output", run, "--seed", seed]
    flags += [] if steps is None else ["--data.max-steps", steps]
    stages.program(policy, run / "complete.json", "train", RECIPES / f"{policy}.py", *flags)


def _annotate(stages: Stages, split: str, policy: str) -> None:
    """Log-probs of every response of a split under a policy: a reference to train against, or to compare policies."""
    data = stages.output / "data" / split
    stages.program(
        f"annotate_{split}_{policy}", data / "annotations", "annotate", "--dataset", data,
        "--model", stages.output / policy, "--with", "reference", "--dtype", "float32",
        "--multiple", MULTIPLE, "--max-buckets", 1,
    )  # fmt: skip


def _new_model(directory: Path, world: Path, config: WorldConfig, seed: int) -> None:
    """A LLaVA-OneVision of under a million parameters whose patches are the cells of a board."""
    from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
    from mmrlhf_jax.models.llava_onevision.model import declare
    from mmrlhf_jax.models.llava_onevision.weights import new_directory
    from mmrlhf_jax.models.qwen2.config import Qwen2Config
    from mmrlhf_jax.models.siglip.config import SiglipConfig
    from mmrlhf_jax.nn.params import count

    side = config.side * digit_boards.CELL
    rows = digit_boards.read_questions(world, "train")
    texts = [text for row in rows for text in (row["question"], *row["answers"])]
    made = new_directory(
        directory,
        LlavaOnevisionConfig(
            tower=SiglipConfig(embed=96, layers=1, heads=2, mlp=256, image_size=side, patch_size=digit_boards.CELL),
            decoder=Qwen2Config(
                embed=128, layers=3, heads=2, kv_heads=2, head_dim=64, mlp=256, rope_theta=1e4, tied=True,
                max_positions=256,
            ),
            pinpoints=((side, side),),
        ),
        texts=[*texts, "user", "assistant"],  # the chat template's words are tokens of their own too
        seed=seed,
    )  # fmt: skip
    print(f"  {count(declare(made)):,} parameters, {made.decoder.vocab} rows of vocabulary")


def _evaluate(output: Path, results: Path) -> None:
    """Every policy on the held-out boards, into `results`."""
    from mmrlhf_jax.data.datasets import open_dataset
    from mmrlhf_jax.inference.engine import DecodeConfig
    from mmrlhf_jax.inference.generate import answers_in_order, generate
    from mmrlhf_jax.inference.sample import SamplingConfig
    from mmrlhf_jax.models.llava_onevision.model import Compute
    from mmrlhf_jax.models.llava_onevision.render import load_renderer
    from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
    from mmrlhf_jax.training.data import reference_key
    from mmrlhf_jax.training.model import load_model, model_fingerprint
    from mmrlhf_jax.training.recipe import INFERENCE
    from mmrlhf_jax.training.runtime import set_up_jax

    set_up_jax("float32")
    dataset, mesh = open_dataset(output / "data" / "held_out"), make_mesh(MeshConfig())
    groups = [dataset.with_media(row) for row in range(len(dataset))]
    truth = {row["id"]: digit_boards.board_of(row) for row in digit_boards.read_questions(output / "world", "held_out")}
    boards = [truth[group.id] for group in groups]
    found: dict[str, Any] = {}
    reference: list[Any] = []
    for policy in POLICIES:
        model = load_model(str(output / policy), mesh, ShardingRules(), rates=INFERENCE, dtype="float32")
        renderer = load_renderer(str(model.assets))
        compute = Compute(platform=mesh.devices.flat[0].platform)
        greedy, run = SamplingConfig(max_new_tokens=MOST_TOKENS), DecodeConfig(max_buckets=1, multiple=MULTIPLE)
        answers = answers_in_order(generate(groups, renderer, model, mesh, compute, greedy, run))
        said = [answer.text for (answer,) in answers]
        key = reference_key(model_fingerprint(model.config, model.params), renderer, "float32")
        logps = _response_logps(dataset, renderer, key)
        reference = reference or logps
        found[policy] = {
            "hallucination": _hallucination(boards, groups, said),
            "preference_accuracy": _accuracy(groups, logps),
            "reward_accuracy": _accuracy(
                groups, [ours - theirs for ours, theirs in zip(logps, reference, strict=True)]
            ),
            "questions": len(groups),
            "answers": [{"id": group.id, "text": text} for group, text in zip(groups, said, strict=True)],
        }
    results.write_text(json.dumps(found, indent=1) + "\n")


def _response_logps(dataset: Any, renderer: Any, key: Mapping[str, str]) -> list[Any]:
    """Log-prob f32 [K] of every response of every group, summed over its tokens, as launch/annotate.py stored them."""
    import numpy as np

    from mmrlhf_jax.data.annotations import AnnotationStore
    from mmrlhf_jax.training.data import REFERENCE

    stored = AnnotationStore.open(dataset.path, REFERENCE, key).read(dataset)
    lengths = [renderer.measure(group).responses for group in dataset.groups()]
    return [
        np.array([part.sum() for part in np.split(stored[row]["logp"], np.cumsum(length)[:-1])])
        for row, length in enumerate(lengths)
    ]


def _accuracy(groups: list[Any], values: list[Any]) -> float:
    """Share of the annotated pairs whose better response has the higher value."""
    right = [
        value[p.chosen] > value[p.rejected] for group, value in zip(groups, values, strict=True) for p in group.pairs
    ]
    return float(sum(right) / len(right))


def _hallucination(boards: list[digit_boards.Board], groups: list[Any], said: list[str]) -> dict[str, float]:
    """Share of wrong claims, over all questions and over those of each kind."""
    counts: dict[str, list[int]] = {"all": [0, 0]}
    for board, group, text in zip(boards, groups, said, strict=True):
        question = group.prompt[0].text
        wrong, total = digit_boards.wrong_claims(board, question, text)
        for kind in ("all", digit_boards.Question.parse(question).kind):
            count = counts.setdefault(kind, [0, 0])
            count[0] += wrong
            count[1] += total
    return {kind: wrong / total for kind, (wrong, total) in counts.items()}


def _table(results: dict[str, Any], taken: dict[str, dict[str, float]], exported: Path) -> list[str]:
    """The lines a user came for."""
    kinds = list(results["sft"]["hallucination"])
    lines = ["", f"{results['sft']['questions']} questions about held-out boards", ""]
    head = " ".join(f"{kind:>7}" for kind in kinds)
    lines += [f"{'':16} wrong claims: {head}   preference accuracy: log-prob  reward"]
    for policy, title in POLICIES.items():
        result = results[policy]
        shares = " ".join(f"{result['hallucination'][kind]:7.1%}" for kind in kinds)
        reward = "-" if policy == "sft" else f"{result['reward_accuracy']:.1%}"
        lines.append(f"{title:16} {'':13} {shares}   {'':20} {result['preference_accuracy']:8.1%} {reward:>7}")
    lines += [
        "",
        "wrong claims: share of the claims of greedy answers, counted against the true board (hallucination rate)",
        "log-prob: pairs whose better answer has the higher log-prob, summed over its tokens, not length-normalised",
        "reward: the same of the log-prob less that under SFT, which is DPO's implicit reward",
        "",
        *(f"{name:26} {t['seconds']:7.1f} s {t['cpu_seconds']:7.1f} CPU s" for name, t in taken.items()),
        f"{'all stages':26} {sum(t['seconds'] for t in taken.values()):7.1f} s "
        f"{sum(t['cpu_seconds'] for t in taken.values()):7.1f} CPU s, peak memory "
        f"{max(t['peak_gib'] for t in taken.values()):.1f} GiB",
        f"the MM-DPO policy, ready for transformers: {exported}",
    ]
    return lines


if __name__ == "__main__":
    run_command(main)
