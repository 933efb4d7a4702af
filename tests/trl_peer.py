"""The same preference rows, trained on by TRL's DPOTrainer and by ours, each through the door its users take.

Needs torch and trl, and `torchvision_shim.mend_torchvision` called before: import it after `pytest.importorskip`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from data_samples import write_rows
from PIL import Image
from safetensors.numpy import load_file
from small_world import metrics
from tiny import random_params, write_tiny_directory

from mmrlhf_jax.data.prepare import PrepareOptions, prepare
from mmrlhf_jax.models.llava_onevision.weights import canonical, save_directory
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.model import load_model
from mmrlhf_jax.training.recipe import ComputeConfig, DataConfig, OptimizerConfig, PartRates, Recipe
from mmrlhf_jax.training.train import train

# Answers best first. Any-res pictures of several shapes, two pictures in one prompt, none; every answer another length.
PROMPTS: list[tuple[list[tuple[int, int]], tuple[str, ...]]] = [
    ([(190, 100)], ("A red cat on a mat.", "Two dogs.", "Nothing to be seen here, I fear; look again.")),
    ([(20, 120)], ("sky", "sea and sand")),
    ([], ("Of course, with pleasure.", "No.")),
    ([(50, 70), (64, 42)], ("The first is taller.", "Both are pictures")),
    ([(240, 200)], ("noise, mostly", "A quiet street in the morning")),
]


@dataclass(frozen=True)
class World:
    """A model directory, pairs as JSON lines, and the same pairs prepared as groups."""

    directory: Path
    rows: list[dict[str, Any]]
    groups: int

    model = property(lambda self: str(self.directory / "model"))
    dataset = property(lambda self: str(self.directory / "dataset"))
    media = property(lambda self: self.directory / "media")


@dataclass(frozen=True)
class Setting:
    """What both trainers are told. `gamma` is the weight of the chosen answers' likelihood."""

    beta: float = 0.1
    gamma: float = 0.0
    tower: bool = True
    steps: int = 1
    rate: float = 1.0
    eps: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Trained:
    """A record for every step under TRL's metric names, and the weights in the hub's spelling, as numpy fp32."""

    records: list[dict[str, float]]
    weights: dict[str, np.ndarray]


def make_world(directory: Path) -> World:
    rng = np.random.default_rng(0)
    rows = []
    (directory / "media").mkdir()
    for number, (sizes, answers) in enumerate(PROMPTS):
        names = [f"{number}-{i}.png" for i in range(len(sizes))]
        for name, (width, height) in zip(names, sizes, strict=True):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / "media" / name)
        base = {"id": f"q{number}", "prompt": f"What is it, {number}?", **({"image": names} if names else {})}
        rows += [
            {**base, "chosen": answers[i], "rejected": answers[j]}
            for i in range(len(answers))
            for j in range(i + 1, len(answers))
        ]
    write_tiny_directory(directory / "assets")
    save_directory(random_params(), directory / "assets", directory / "model")
    file = write_rows(directory / "pairs.jsonl", rows)
    world = World(directory, rows, len(PROMPTS))
    prepare(PrepareOptions(source="mm_rlhf", inputs=(file,), output=world.dataset, media=str(world.media)))
    return world


def train_theirs(
    world: World, setting: Setting, output: Path, *, pairs_at_once: int | None = None, dataset: Any = None
) -> Trained:
    """Every step sees the whole file: all pairs in one batch, or accumulated over batches of `pairs_at_once`. `dataset`
    is one of `datasets` with the same pairs, to train on instead of the world's rows."""
    from datasets import Dataset
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    from trl import DPOConfig, DPOTrainer

    def conversation(row: dict[str, Any]) -> dict[str, Any]:
        turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        pictures = [Image.open(world.media / name).convert("RGB") for name in row.get("image", [])]
        return {"images": pictures} | {k: [{"role": role, "content": row[k]}] for k, role in turns.items()}

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(world.model, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(setting.tower)
    processor = AutoProcessor.from_pretrained(world.model)
    processor.image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(world.model)  # else torchvision resizes
    batch = pairs_at_once or len(world.rows)
    settings = DPOConfig(
        output_dir=str(output),
        loss_type=["sigmoid", "sft"] if setting.gamma else ["sigmoid"],
        loss_weights=[1.0, setting.gamma] if setting.gamma else None,
        beta=setting.beta,
        max_length=None,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(world.rows) // batch,
        max_steps=setting.steps,
        learning_rate=setting.rate,
        lr_scheduler_type="constant",
        adam_beta1=setting.b1,
        adam_beta2=setting.b2,
        adam_epsilon=setting.eps,
        weight_decay=setting.weight_decay,
        max_grad_norm=setting.clip_norm,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=model,
        args=settings,
        train_dataset=dataset or Dataset.from_list([conversation(row) for row in world.rows]),
        processing_class=processor,
    )
    trainer.train()
    model.save_pretrained(output / "hf")
    return Trained([r for r in trainer.state.log_history if "loss" in r], _read(output / "hf"))


def train_ours(world: World, setting: Setting, output: Path, pairing: str = "pairs") -> Trained:
    recipe = Recipe(
        objective=DPO(beta=setting.beta, gamma=setting.gamma),
        model=world.model,
        dataset=world.dataset,
        reference="online",
        data=DataConfig(
            pairing=pairing,
            groups_per_step=len(world.rows) if pairing == "pairs" else world.groups,
            max_steps=setting.steps,
            max_buckets=1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=setting.rate,
            schedule="constant",
            warmup=0.0,
            rates=PartRates(tower=float(setting.tower)),
            weight_decay=setting.weight_decay,
            b1=setting.b1,
            b2=setting.b2,
            eps=setting.eps,
            clip_norm=setting.clip_norm,
        ),
        compute=ComputeConfig(dtype="float32"),
    )
    train(recipe, output)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    trained = load_model(str(output), mesh, ShardingRules(), rates=recipe.optimizer.rates)
    save_directory(trained.params, trained.assets, output / "hf", "float32")
    return Trained(metrics(output), _read(output / "hf"))


def start_of(world: World) -> dict[str, np.ndarray]:
    return _read(Path(world.model))


def _read(directory: Path) -> dict[str, np.ndarray]:
    return {canonical(name): w for name, w in load_file(directory / "model.safetensors").items()}
