"""Plain DPO of LLaVA-OneVision 0.5B with adapters: for pairs of your own, which need no margins and no reward model.

The reference is the policy without its adapters: no annotation beforehand, and no second copy of the model. gamma, the
weight of the preferred answers' NLL, is MM-DPO's. Rank, rate and steps are usual ones for adapters, not tuned.

Hardware. Not run with published weights yet, so no time is claimed:
    1 x GPU of 12 GB or more     (default; launch/plan.py estimates 2.9 GiB at the least, 17 where there is room)
    any CPU, slowly              --compute.dtype float32 --data.workers 0

    python launch/prepare.py --source trl --input pairs.jsonl --media MEDIA --output DATASET --model MODEL
    python launch/train.py configs/dpo_onevision_0_5b_lora.py --model MODEL --dataset DATASET --output RUN
    python launch/export.py RUN --output ALIGNED
"""

from mmrlhf_jax.models.llava_onevision.render import RenderOptions
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.recipe import ComputeConfig, DataConfig, LoraConfig, OptimizerConfig, Recipe

recipe = Recipe(
    objective=DPO(beta=0.1, gamma=0.25),
    reference="lora_off",
    render=RenderOptions(frames=10),
    data=DataConfig(groups_per_step=16, epochs=1.0, workers=2),
    lora=LoraConfig(rank=16, alpha=32.0),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup=0.1, weight_decay=0.0),
    compute=ComputeConfig(dtype="bfloat16"),
)
