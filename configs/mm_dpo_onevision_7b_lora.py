"""MM-DPO of LLaVA-OneVision 7B on one GPU: adapters on decoder and projector instead of all parameters.

Not in the paper, which trains all of decoder and projector (configs/mm_dpo_onevision_7b.py; beta, w, k, gamma, frames
and batch are that recipe's). Rank, alpha and rate are common choices for LoRA of this model, not tuned here. The
reference is the policy without its adapters: no second model and no log-probs to prepare. Checkpoints hold the adapters
and their moments only, 2 GB.

Hardware. Not run yet, so no time is claimed:
    1 x H100 80 GB       (default; weights 16 GB in bf16, adapters with gradients and moments 2.6 GB)
    8 x GPU of 40 GB     --mesh.fsdp 8
    v5e-8 / v6e-8        --mesh.fsdp 8

    python launch/train.py configs/mm_dpo_onevision_7b_lora.py --margins reward \\
        --model MODEL --dataset DATASET --output RUN
    python launch/export.py RUN --output ALIGNED                merged weights
    python launch/export.py RUN --output ADAPTER --adapter      what peft loads
"""

from mmrlhf_jax.models.llava_onevision.render import RenderOptions
from mmrlhf_jax.objectives import MMDPO
from mmrlhf_jax.training.recipe import ComputeConfig, DataConfig, LoraConfig, OptimizerConfig, Recipe

recipe = Recipe(
    objective=MMDPO(beta=0.1, w=0.5, k=0.5, gamma=0.25),
    reference="lora_off",
    render=RenderOptions(frames=10),
    data=DataConfig(groups_per_step=96, epochs=1.0, workers=8),
    lora=LoraConfig(rank=64, alpha=128.0),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup=0.1, weight_decay=0.0),
    compute=ComputeConfig(dtype="bfloat16"),
)
