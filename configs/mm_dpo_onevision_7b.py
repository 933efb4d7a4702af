"""MM-DPO of LLaVA-OneVision 7B, as published (arXiv 2502.10391, sections 4.2 and 5; Table 2's last column).

Published: beta 0.1, w 0.5, k 0.5, one epoch, tower frozen, 384 pairs a step (32 GPUs x 1 x 12 in the released script):
with 3 to 5 ranked responses a picture that is about 96 groups. Learning rate (grid 1e-7 to 1e-5) and weight of the NLL
term (grid 0 to 1) were searched; 1e-6 and 0.25 are the released script's. 10 frames a video, as released training.
Margins: --margins reward, after launch/annotate.py --with reward; or they come with the data (--margin-column, or a
score for every response).

Hardware and meshes; one flag each. None has been run yet, so no time is claimed:
    8 x H100 80 GB      --mesh.fsdp 8
    1 x H200 141 GB     --optimizer.second-moment factored
    v5e-64 (16 GB)      --mesh.fsdp 16 --mesh.tensor 4
    v5p-16 (95 GB)      --mesh.fsdp 8                   (v5p counts cores: 8 chips)
    v6e-32 (32 GB)      --mesh.fsdp 16 --mesh.tensor 2
What layers compute again and how many groups a micro-batch holds follow from the device's memory; launch/plan.py says
what that comes to. The number of groups in a micro-batch is a multiple of data x fsdp: far beyond 64 such devices use
tensor instead.

    python launch/annotate.py --dataset DATASET --model MODEL --with reference
    python launch/train.py configs/mm_dpo_onevision_7b.py --model MODEL --dataset DATASET --output RUN --margins reward

The two losses the authors released, under their own names, are `MMDPOReleasedFactor` and `MMDPOReleasedBatch` of
mmrlhf_jax.objectives; plain DPO is `DPO`: set `objective` in a copy of this file.
"""

from mmrlhf_jax.models.llava_onevision.render import RenderOptions
from mmrlhf_jax.objectives import MMDPO
from mmrlhf_jax.training.recipe import ComputeConfig, DataConfig, OptimizerConfig, Recipe

recipe = Recipe(
    objective=MMDPO(beta=0.1, w=0.5, k=0.5, gamma=0.25),
    render=RenderOptions(frames=10),
    data=DataConfig(groups_per_step=96, epochs=1.0, workers=8),
    optimizer=OptimizerConfig(
        learning_rate=1e-6, schedule="cosine", warmup=0.1, weight_decay=0.0, first_moment="bfloat16"
    ),
    compute=ComputeConfig(dtype="bfloat16"),
)
