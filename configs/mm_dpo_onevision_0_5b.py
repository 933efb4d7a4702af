"""MM-DPO of LLaVA-OneVision 0.5B, as published (arXiv 2502.10391; Table 2's middle column).

The paper gives the 0.5B model no settings of its own; these are configs/mm_dpo_onevision_7b.py's.

Hardware and meshes. None has been run yet, so no time is claimed:
    1 x GPU of 24 GB or more     (default)
    8 x H100 80 GB               --mesh.fsdp 8
    v5e-16 / v5p-8 / v6e-8       --mesh.fsdp -1 (all chips share one copy)
Tied embeddings and 14 heads: `tensor` may be 2 (2 key heads).

    python launch/annotate.py --dataset DATASET --model MODEL --with reference
    python launch/train.py configs/mm_dpo_onevision_0_5b.py --margins reward \\
        --model MODEL --dataset DATASET --output RUN
"""

from mmrlhf_jax.models.llava_onevision.render import RenderOptions
from mmrlhf_jax.objectives import MMDPO
from mmrlhf_jax.training.recipe import ComputeConfig, DataConfig, OptimizerConfig, Recipe

recipe = Recipe(
    objective=MMDPO(beta=0.1, w=0.5, k=0.5, gamma=0.25),
    render=RenderOptions(frames=10),
    data=DataConfig(groups_per_step=96, epochs=1.0, workers=8),
    optimizer=OptimizerConfig(learning_rate=1e-6, schedule="cosine", warmup=0.1, weight_decay=0.0),
    compute=ComputeConfig(dtype="bfloat16"),
)
