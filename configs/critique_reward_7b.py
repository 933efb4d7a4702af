"""MM-RLHF's critique-based reward model on LLaVA-OneVision 7B: it learns to criticise, then to score.

Published: critique and score learned together, the head linear, tower frozen. Released, and here: one epoch at 1e-6,
cosine, warm-up .1, centring .01, 768 pairs a step, which is about 200 groups (`--reward.head tanh` is the head that was
released). The human reasons of dpo_pairs.jsonl are the critiques. Frames as in MM-DPO's recipe, so that the margins are
of what the policy sees. Hardware and meshes as configs/mm_dpo_onevision_7b.py; not run yet.

    python launch/prepare.py --source mm_rlhf --input dpo_pairs.jsonl --media MEDIA --output DATA --model MODEL
    python launch/train.py configs/critique_reward_7b.py --model MODEL --dataset DATA --output RUN --mesh.fsdp 8
    python launch/annotate.py --dataset DATA --model RUN --with reward --mesh.fsdp 8
    python launch/train.py configs/mm_dpo_onevision_7b.py --margins reward --model MODEL --dataset DATA --output OUT
"""

from mmrlhf_jax.models.llava_onevision.render import RenderOptions
from mmrlhf_jax.objectives import CritiqueReward
from mmrlhf_jax.training.recipe import ComputeConfig, DataConfig, OptimizerConfig, Recipe

recipe = Recipe(
    objective=CritiqueReward(critique=1.0, bradley_terry=1.0, centre=0.01),
    render=RenderOptions(frames=10),
    data=DataConfig(groups_per_step=200, epochs=1.0, workers=8),
    optimizer=OptimizerConfig(
        learning_rate=1e-6, schedule="cosine", warmup=0.1, weight_decay=0.0, first_moment="bfloat16"
    ),
    compute=ComputeConfig(dtype="bfloat16"),
)
