"""Which family a model directory is of, and what each family gives to programs that serve all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from mmrlhf_jax.models.critique_reward import model as critique_reward
from mmrlhf_jax.models.critique_reward import weights as critique_reward_weights
from mmrlhf_jax.models.critique_reward.config import CritiqueRewardConfig, read_settings
from mmrlhf_jax.models.key_table import Key
from mmrlhf_jax.models.llava_onevision import config as llava_onevision_config
from mmrlhf_jax.models.llava_onevision import model as llava_onevision
from mmrlhf_jax.models.llava_onevision import weights as llava_onevision_weights
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig


def read_config(assets: epath.PathLike) -> LlavaOnevisionConfig:
    """The configuration of a directory of assets: a CritiqueRewardConfig where there is a reward.json."""
    config = llava_onevision_config.read_config(str(assets))
    settings = read_settings(assets)
    return config if settings is None else reward_config(config, settings.head, settings.attributes, settings.quantiles)


def reward_config(
    config: LlavaOnevisionConfig, head: Any, attributes: tuple[str, ...] = (), quantiles: int = 0
) -> CritiqueRewardConfig:
    """`config` under a reward head."""
    shape = {field.name: getattr(config, field.name) for field in dataclasses.fields(LlavaOnevisionConfig)}
    return CritiqueRewardConfig(**shape, head=head, attributes=attributes, quantiles=quantiles)


def is_reward(config: LlavaOnevisionConfig) -> bool:
    return isinstance(config, CritiqueRewardConfig)


def declare(config: LlavaOnevisionConfig) -> Any:
    """All parameters of a model, as `Param` declarations."""
    return (
        critique_reward.declare(config) if isinstance(config, CritiqueRewardConfig) else llava_onevision.declare(config)
    )


def keys_of(config: LlavaOnevisionConfig) -> Sequence[Key]:
    """The key table of a model."""
    return critique_reward_weights.KEYS if is_reward(config) else llava_onevision_weights.KEYS
