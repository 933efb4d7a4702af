"""A recipe is one run: frozen dataclasses, filled in by a Python file under configs/, each field a command line
flag."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmrlhf_jax.command import UsageError
from mmrlhf_jax.data.buckets import MAX_BUCKETS, MULTIPLE
from mmrlhf_jax.data.pipeline import Kept, Mean, Pairing
from mmrlhf_jax.models.critique_reward.config import RewardSettings
from mmrlhf_jax.models.llava_onevision.render import RenderOptions
from mmrlhf_jax.nn.attention import Backend
from mmrlhf_jax.nn.remat import RematRung
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules
from mmrlhf_jax.objectives import (
    AOT,
    MMDPO,
    AOTUnpaired,
    AttributeObjective,
    CritiqueReward,
    MarginReward,
    Objective,
    PlackettLuce,
    QuantileReward,
    RewardObjective,
    ScalarReward,
    ScoreObjective,
    Supervised,
)
from mmrlhf_jax.training.peers import StuckConfig

SLOTS_OF_UNKNOWN = 8192  # a device forwards at once, if its memory is not known


@dataclass(frozen=True)
class DataConfig:
    groups_per_step: int = 96
    """groups an optimizer step sees; the paper's 384 pairs are about 80 to 104 groups. In pairs mode: pairs"""
    epochs: float = 1.0
    max_steps: int | None = None
    """take exactly this many steps, whatever the epochs say"""
    pairing: Pairing = "groups"
    """groups: one forward a group, all pairs; pairs: every pair as two full sequences, to compare with other
    trainers"""
    mean: Mean = "pairs"
    """the loss is a mean over pairs, or over groups with each group's pairs sharing one weight"""
    responses: Kept = "all"
    """supervised fine-tuning only: train on all responses of a group, or on its best"""
    max_buckets: int = MAX_BUCKETS
    """distinct static shapes, each compiled once"""
    multiple: int = MULTIPLE
    """prompt and response slots are multiples of this"""
    slots_per_device: int = 0
    """tokens (tiles counted in tokens) a device forwards at once, where more than one group fits; a group is never
    cut. 0: as many as its memory holds, up to 16,384 (training/fit.py); on CPUs 8,192"""
    workers: int = 0
    """processes that decode and tokenize; 0 = threads of this one"""

    @property
    def slots(self) -> int:
        """`slots_per_device`; where nothing has chosen them, those of a device whose memory is not known."""
        return self.slots_per_device or SLOTS_OF_UNKNOWN


@dataclass(frozen=True)
class PartRates:
    """Learning-rate multipliers; 0 freezes a part, and a frozen part keeps the dtype its checkpoint has."""

    decoder: float = 1.0
    projector: float = 1.0
    """the projector and the newline embedding"""
    tower: float = 0.0
    head: float = 1.0
    """the score's head, of a reward model"""


INFERENCE = PartRates(decoder=0.0, projector=0.0, tower=0.0, head=0.0)  # nothing trains: every part as it is stored


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    """share of all steps over which the rate rises from 0"""
    rates: PartRates = PartRates()
    weight_decay: float = 0.0
    """on kernels and embeddings (tokens, a tower's positions, the newline) only, never on norms and biases"""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    """global norm gradients are clipped to; inf = never"""
    first_moment: Literal["float32", "bfloat16"] = "float32"
    second_moment: Literal["float32", "factored"] = "float32"
    """factored: a row and a column instead of a matrix, as Adafactor's, with its decay and clipping; b2 and eps are
    Adam's"""


@dataclass(frozen=True)
class ComputeConfig:
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """activations and matrix products; parameters that train are fp32 whatever this says"""
    attention: Backend = "auto"
    remat: RematRung | Literal["auto"] = "auto"
    """what a layer computes again for its backward pass: full (everything), attention, projections, none (keeps all).
    auto: as little as the device's memory allows (training/fit.py); on CPUs full"""
    vocab_chunk: int = 8192
    """vocabulary rows whose logits exist at once"""

    @property
    def rung(self) -> RematRung:
        """`remat`; where nothing has chosen it, that of a device whose memory is not known."""
        return "full" if self.remat == "auto" else self.remat


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): they alone train, everything else keeps its checkpoint's dtype."""

    rank: int = 0
    """inner dimension; 0 = no adapters, the parameters themselves train"""
    alpha: float = 32.0
    """the update is scaled by alpha / rank"""
    targets: tuple[str, ...] = ("decoder.layers.*_kernel", "projector.*_kernel")
    """glob patterns over the names of kernels; rates of decoder and projector apply to their adapters"""


@dataclass(frozen=True)
class RewardConfig:
    """Of a reward model that is trained; nothing here is read by other objectives."""

    head: Literal["linear", "tanh"] = "linear"
    """linear: one layer, as published; tanh: Linear-tanh-Linear, as released"""
    template: str = ""
    """a file with the critique's prompt ({question} and {answer} behind [Question]: and [LMM Response]:, ending in
    [Evaluation]:); empty: the starting reward model's own, else the built-in one"""
    attributes: tuple[str, ...] = ()
    """what MultiObjectiveReward and QuantileReward learn: names of the data's ratings, the head's outputs in their
    order"""
    quantiles: int = 0
    """outputs of each attribute under QuantileReward: the quantiles q / (quantiles + 1) of what it would be rated"""
    facts: bool = False
    """show the data's facts (captions, options) behind the question, as in Fact-RLHF; every group must have some"""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out groups, scored while training: before the first step, every `every` steps and after the last."""

    every: int = 0
    """steps between evaluations; 0 = none at all"""
    share: float = 0.0
    """part of the data set aside and never trained on; what shares prompt and pictures stays on one side"""
    dataset: str = ""
    """or: a DATASET of its own (a mixture file will do) to evaluate on, all of it"""
    metric: str = "loss"
    """which of the objective's metrics makes a checkpoint the best: losses are better low, everything else high"""
    patience: int = 0
    """stop after this many evaluations in a row that were not the best; 0 = never"""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    """steps between checkpoints; the last step always has one, and the best evaluation its own"""
    keep: int = 2
    """latest checkpoints to keep, beside the best one; with 1 there is none to go back to from a damaged one"""
    grace: float = 30.0
    """seconds the machine leaves between SIGTERM and SIGKILL; a warning is printed when a checkpoint takes longer"""


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = False
    """needs the `tensorboard` extra"""
    wandb: str = ""
    """Weights & Biases project to log to (needs the `wandb` extra); empty = none"""
    profile: str = ""
    """START:STOP, steps whose trace jax.profiler writes into RUN/profile, for TensorBoard or Perfetto"""


@dataclass(frozen=True)
class Recipe:
    """Everything a run is. `launch/train.py RECIPE.py --field.subfield VALUE` changes any of it."""

    objective: Objective = field(default_factory=MMDPO)
    model: str = ""
    """the starting point and, unless `reference_model` names one, the reference: a Hugging Face directory, a hub id, or
    a RUN"""
    dataset: str = ""
    """a directory made by launch/prepare.py, or a mixture file that names several"""
    reference: Literal["stored", "online", "lora_off"] = "stored"
    """stored: log-probs made by launch/annotate.py; online: a frozen copy of the starting model runs beside the
    policy; lora_off: the policy itself without its adapters, which costs no memory"""
    reference_model: str = ""
    """the reference, where it is not the model that training starts from, as in online rounds that keep to their first:
    a MODEL with the same configuration and tokenizer"""
    margins: str = "data"
    """where MM-DPO's margins come from. data: the dataset's own column or scores; reward: differences of the scores
    that launch/annotate.py --with reward stored; where it stored several, one by name (reward-0123456789abcdef)"""
    render: RenderOptions = field(default_factory=RenderOptions)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sharding: ShardingRules = field(default_factory=ShardingRules)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    stuck: StuckConfig = field(default_factory=StuckConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        supervised = isinstance(self.objective, Supervised)
        reward = isinstance(self.objective, RewardObjective)
        if not supervised and self.data.responses != "all":
            raise ValueError("data.responses = 'best' is for supervised fine-tuning; a preference needs both sides")
        if supervised and self.data.pairing == "pairs":
            raise ValueError("data.pairing = 'pairs' is for preference objectives; supervised fine-tuning has no pairs")
        if supervised and self.data.mean != "pairs":
            raise ValueError("data.mean = 'groups' weighs pairs; supervised fine-tuning is a mean over tokens")
        if self.data.pairing == "pairs" and trains_on_ties(self.objective):
            raise ValueError(
                "data.pairing = 'pairs' trains on pairs alone, without ties: set objective.tie 0 beside it"
            )
        if self.data.pairing == "pairs" and isinstance(self.objective, AttributeObjective):
            name = type(self.objective).__name__
            raise ValueError(f"data.pairing = 'pairs' counts a rating once a pair, of which {name} needs it once")
        if self.data.mean != "pairs" and isinstance(self.objective, AOT | AOTUnpaired | PlackettLuce):
            name = type(self.objective).__name__
            raise ValueError(f"data.mean = 'groups' weighs pairs, which {name} does not: leave it at 'pairs'")
        if not self.objective.needs_reference and self.reference != "stored":
            raise ValueError(f"reference = {self.reference!r} costs a second forward that this objective never reads")
        if self.reference_model and not self.objective.needs_reference:
            name = type(self.objective).__name__
            raise ValueError(f"reference_model = {self.reference_model!r}: {name} reads no reference log-probs")
        if self.reference_model and self.reference == "lora_off":
            raise ValueError("reference = 'lora_off' is the model under the adapters: set no reference_model beside it")
        if self.margins != "data" and not self.objective.needs_margin:
            raise ValueError(f"margins = {self.margins!r}: {type(self.objective).__name__} reads no margins")
        if self.reward != RewardConfig() and not reward:
            raise ValueError(
                "reward.* is for reward models: set objective to CritiqueReward, ScalarReward or another of them"
            )
        if self.reward.template and isinstance(self.objective, ScoreObjective):
            name = type(self.objective).__name__
            raise ValueError(f"reward.template is the prompt of a critique, which {name} does without")
        _check_outputs(self)
        _check_numbers(self)
        if self.lora.rank < 0:
            raise ValueError(f"lora.rank is {self.lora.rank}: it must not be negative")
        if self.reference == "lora_off" and not self.lora.rank:
            raise ValueError("reference = 'lora_off' needs adapters to switch off: set lora.rank")
        _check_evaluation(self.evaluation)
        adam = OptimizerConfig()
        if self.optimizer.second_moment == "factored" and (self.optimizer.b2, self.optimizer.eps) != (
            adam.b2,
            adam.eps,
        ):
            raise ValueError("optimizer.b2 and .eps are Adam's: a factored second moment has a decay of its own")


def trains_on_ties(objective: Objective) -> bool:
    return isinstance(objective, CritiqueReward | ScalarReward | MarginReward) and objective.tie > 0


def _check_outputs(recipe: Recipe) -> None:
    """Raises ValueError where the head's outputs are not those the objective trains."""
    objective, reward, name = recipe.objective, recipe.reward, type(recipe.objective).__name__
    if not isinstance(objective, AttributeObjective):
        if reward.attributes or reward.quantiles:
            raise ValueError(f"reward.attributes and .quantiles are outputs that {name} does not train: it has a score")
        return
    if not reward.attributes:
        raise ValueError(f"{name} learns ratings: name them in reward.attributes, as the data does")
    quantiles = isinstance(objective, QuantileReward)
    if quantiles != (reward.quantiles > 0):
        wanted = "the outputs of each attribute, 19 for example" if quantiles else "0: it has one output an attribute"
        raise ValueError(f"reward.quantiles is {reward.quantiles}; of {name} it is {wanted}")
    if not objective.bradley_terry and recipe.data.mean != "pairs":
        raise ValueError(f"data.mean = 'groups' weighs pairs, which {name} without bradley_terry does not")
    RewardSettings(critique=False, attributes=reward.attributes, quantiles=reward.quantiles)  # raises what is senseless


def _check_numbers(recipe: Recipe) -> None:
    """Raises ValueError for numbers by which nothing would be trained, or not what was meant."""
    data, optimizer, checkpoint = recipe.data, recipe.optimizer, recipe.checkpoint
    rates = {f"rates.{part}": rate for part, rate in dataclasses.asdict(optimizer.rates).items()}
    for name, value, fits, wanted in (
        ("data.groups_per_step", data.groups_per_step, data.groups_per_step >= 1, "at least 1"),
        ("data.max_buckets", data.max_buckets, data.max_buckets >= 1, "at least 1"),
        ("data.multiple", data.multiple, data.multiple >= 1, "at least 1"),
        ("data.slots_per_device", data.slots_per_device, data.slots_per_device >= 0, "not negative"),
        ("data.workers", data.workers, data.workers >= 0, "not negative"),
        ("data.max_steps", data.max_steps, data.max_steps is None or data.max_steps >= 1, "at least 1"),
        ("data.epochs", data.epochs, 0 < data.epochs < math.inf, "positive and finite"),
        ("optimizer.warmup", optimizer.warmup, 0 <= optimizer.warmup <= 1, "a share of all steps, from 0 to 1"),
        ("optimizer.b1", optimizer.b1, 0 <= optimizer.b1 < 1, "in [0, 1)"),
        ("optimizer.b2", optimizer.b2, 0 <= optimizer.b2 < 1, "in [0, 1)"),
        ("optimizer.eps", optimizer.eps, optimizer.eps > 0, "positive"),
        ("optimizer.clip_norm", optimizer.clip_norm, optimizer.clip_norm > 0, "positive; inf = never"),
        ("checkpoint.every", checkpoint.every, checkpoint.every >= 1, "at least 1"),
        ("checkpoint.keep", checkpoint.keep, checkpoint.keep >= 1, "at least 1"),
        ("checkpoint.grace", checkpoint.grace, checkpoint.grace > 0, "positive"),
        ("lora.alpha", recipe.lora.alpha, 0 < recipe.lora.alpha < math.inf, "positive and finite"),
        ("seed", recipe.seed, recipe.seed >= 0, "not negative"),
        ("compute.vocab_chunk", recipe.compute.vocab_chunk, recipe.compute.vocab_chunk >= 1, "at least 1"),
        *(
            (f"optimizer.{name}", value, 0 <= value < math.inf, "finite and not negative")
            for name, value in (
                ("learning_rate", optimizer.learning_rate), ("weight_decay", optimizer.weight_decay), *rates.items()
            )
        ),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"{name} is {value}: it must be {wanted}")


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    held_out = bool(evaluation.share) + bool(evaluation.dataset)
    if evaluation.every < 0 or evaluation.patience < 0 or not 0 <= evaluation.share < 1:
        raise ValueError("evaluation.every and .patience must not be negative, .share must lie in [0, 1)")
    if evaluation.every and held_out != 1:
        raise ValueError("evaluation.every needs groups to evaluate on: set evaluation.share or evaluation.dataset")
    if held_out and not evaluation.every:
        raise ValueError("evaluation.share and .dataset do nothing without evaluation.every")


# what may differ between a run and its resumption: it changes how, not what (model and data are held to fingerprints)
FREE_ON_RESUME = (
    "model", "dataset", "evaluation.dataset", "evaluation.patience", "mesh", "sharding", "checkpoint", "log", "stuck",
    "compute.remat", "compute.attention", "compute.vocab_chunk", "data.workers", "data.max_buckets", "data.multiple",
    "data.slots_per_device",
)  # fmt: skip


def read_recipe(path: str | Path) -> Recipe:
    """The `recipe` of a Python file under configs/. Raises UsageError when there is none."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such recipe")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise UsageError(f"{path}: a recipe file defines `recipe = Recipe(...)`; this one does not")
    return recipe


def flatten(recipe: Recipe) -> dict[str, Any]:
    """{"optimizer.rates.tower": 0.0, ...}; the objective's class stands under "objective"."""
    out: dict[str, Any] = {"objective": type(recipe.objective).__name__}

    def walk(value: Any, name: str) -> None:
        if dataclasses.is_dataclass(value):
            for entry in dataclasses.fields(value):
                walk(getattr(value, entry.name), f"{name}.{entry.name}" if name else entry.name)
        else:
            out[name] = list(value) if isinstance(value, tuple) else value

    walk(recipe, "")
    return out


def defaults(objective: Objective) -> dict[str, Any]:
    """`flatten` of a recipe that says nothing but its objective; there need not be a valid one."""
    bare = {name: value for name, value in flatten(Recipe()).items() if name.split(".")[0] != "objective"}
    own = {f"objective.{f.name}": getattr(objective, f.name) for f in dataclasses.fields(objective)}
    return {"objective": type(objective).__name__, **own, **bare}


def as_json(recipe: Recipe) -> str:
    return json.dumps(flatten(recipe), indent=2) + "\n"


def differences(saved: dict[str, Any], recipe: Recipe) -> list[str]:
    """Lines that say what a resumed run may not change, empty when it may go on. A run begun before a field existed ran
    with that field's default."""
    now = json.loads(json.dumps(flatten(recipe)))
    saved = {**json.loads(json.dumps(defaults(recipe.objective))), **saved}
    names = [n for n in sorted({*saved, *now}) if not any(n == f or n.startswith(f + ".") for f in FREE_ON_RESUME)]
    return [f"{n}: was {saved.get(n)!r}, now {now.get(n)!r}" for n in names if saved.get(n) != now.get(n)]
