"""A scalar reward model beside the quickstart's critique reward model: a score at the end of the plain answer, from the
same SFT run.

Same groups, same number of steps, same rate; it is told which answer is better and never why. Hardware: two CPU cores,
about two minutes. launch/study.py runs it as

    python launch/train.py configs/study/scalar_reward.py --model SFT_RUN --dataset DATASET --output RUN
"""

import dataclasses
from pathlib import Path

from mmrlhf_jax.objectives import ScalarReward
from mmrlhf_jax.training.recipe import RewardConfig, read_recipe

critique = read_recipe(Path(__file__).parents[1] / "quickstart" / "critique_reward_tasks.py")
recipe = dataclasses.replace(critique, objective=ScalarReward(), reward=RewardConfig(head=critique.reward.head))
