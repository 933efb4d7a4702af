"""The critique-based reward model (arXiv 2502.10391, section 3): the policy, which writes a critique of an answer, and
a head that reads a score where the critique ends.

Over groups: picture, question and template go through the decoder once, and "answer, critique" is a branch. A scalar
model is the same with branches that are answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mmrlhf_jax.batch import GroupBatch
from mmrlhf_jax.models.critique_reward.config import CritiqueRewardConfig
from mmrlhf_jax.models.llava_onevision import model as llava_onevision
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.model import Compute, LlavaOnevision, Projector
from mmrlhf_jax.models.qwen2.model import Qwen2
from mmrlhf_jax.models.siglip.model import Siglip
from mmrlhf_jax.nn.params import Param
from mmrlhf_jax.nn.token_logps import TokenLogps


@struct.dataclass
class LinearHead:
    """One linear layer, as published."""

    kernel: Any  # [D, O]; O = 1, or the outputs of all attributes one after another
    bias: Any  # [O]


@struct.dataclass
class TanhHead:
    """Linear, tanh, linear, as released (its dropout of 0 left out)."""

    dense_kernel: Any  # [D, D]
    dense_bias: Any
    out_kernel: Any  # [D, O]
    out_bias: Any


@struct.dataclass
class CritiqueReward:
    """A policy's parameters, under the names they have there, and the head."""

    tower: Siglip
    projector: Projector
    newline: Any
    decoder: Qwen2
    head: LinearHead | TanhHead

    @property
    def policy(self) -> LlavaOnevision:
        return LlavaOnevision(self.tower, self.projector, self.newline, self.decoder)


def declare(config: CritiqueRewardConfig) -> CritiqueReward:
    """All parameters, as `Param` declarations."""
    return with_head(llava_onevision.declare(config), declare_head(config))


def declare_head(config: CritiqueRewardConfig) -> LinearHead | TanhHead:
    """A fresh head starts as torch's linear layers do, uniform in +-1/sqrt(D), as the released code's did."""
    d = config.decoder.embed
    kernel = Param((d, config.outputs), (None, None), "uniform", fan_in=d)
    bias = Param((config.outputs,), (None,), "uniform", fan_in=d)
    if config.head == "linear":
        return LinearHead(kernel, bias)
    dense = Param((d, d), ("embed", None), "uniform", fan_in=d)
    return TanhHead(dense, Param((d,), (None,), "uniform", fan_in=d), kernel, bias)


def with_head(policy: LlavaOnevision, head: LinearHead | TanhHead) -> CritiqueReward:
    return CritiqueReward(policy.tower, policy.projector, policy.newline, policy.decoder, head)


def read_score(params: CritiqueReward, hidden: jax.Array) -> jax.Array:
    """Final normalised hidden states [..., D] -> scores f32 [...] of a head of one output.

    Raises ValueError for a head of several, of which a score is made in more than one way.
    """
    output = read_outputs(params, hidden)
    if output.shape[-1] != 1:
        raise ValueError(f"a head of {output.shape[-1]} outputs has no one score: it is read in a direction")
    return output[..., 0]


def read_outputs(params: CritiqueReward, hidden: jax.Array) -> jax.Array:
    """Final normalised hidden states [..., D] -> f32 [..., O]. In fp32 throughout: margins are differences."""
    x, head = hidden.astype(jnp.float32), jax.tree.map(lambda p: p.astype(jnp.float32), params.head)
    if isinstance(head, LinearHead):
        return _times(x, head.kernel) + head.bias
    inner = jnp.tanh(_times(x, head.dense_kernel) + head.dense_bias)
    return _times(inner, head.out_kernel) + head.out_bias


def _times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, precision="highest")  # accelerators multiply fp32 in less unless told


def branch_scores(params: CritiqueReward, hidden: jax.Array, batch: GroupBatch) -> jax.Array:
    """Scores f32 [B, K] read at every branch's end from hidden states [N, P+S, D]; of a response that is not there,
    garbage. Rows of separate branches fold back into their group."""
    with jax.named_scope("reward_head"):
        return read_score(params, _ends(hidden, batch)).reshape(batch.response_mask.shape)


def _ends(hidden: jax.Array, batch: GroupBatch) -> jax.Array:
    return jnp.take_along_axis(hidden, batch.branch_end[:, :, None], axis=1)


def scores(
    params: CritiqueReward,
    config: LlavaOnevisionConfig,
    batch: GroupBatch,
    compute: Compute,
    read: Callable[[CritiqueReward, jax.Array], jax.Array] = read_score,
) -> jax.Array:
    """Scores f32 [B, K] of every branch of every group; of a head of several outputs what `read` makes of hidden states
    [..., D], [B, K, ...]."""
    hidden = llava_onevision.hidden_states(params.policy, config, batch, compute)
    with jax.named_scope("reward_head"):
        found = read(params, _ends(hidden, batch))
        return found.reshape(*batch.response_mask.shape, *found.shape[2:])


def outputs(params: CritiqueReward, config: CritiqueRewardConfig, batch: GroupBatch, compute: Compute) -> jax.Array:
    """All outputs of the head f32 [B, K, A, Q] at every branch's end: one a response is [B, K, 1, 1]."""
    hidden = llava_onevision.hidden_states(params.policy, config, batch, compute)
    with jax.named_scope("reward_head"):
        return shaped(config, read_outputs(params, _ends(hidden, batch)).reshape(*batch.response_mask.shape, -1))


def shaped(config: CritiqueRewardConfig, output: jax.Array) -> jax.Array:
    """Outputs [..., O] as [..., A, Q]."""
    return output.reshape(*output.shape[:-1], max(1, len(config.attributes)), max(1, config.quantiles))


def scores_of_tokens(
    params: CritiqueReward, config: LlavaOnevisionConfig, batch: GroupBatch, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """Scores f32 [B, K] of every branch, and f32 [N, S] read after each of its tokens; those of padding are garbage."""
    hidden = llava_onevision.hidden_states(params.policy, config, batch, compute)
    with jax.named_scope("reward_head"):
        token_score = read_score(params, hidden[:, batch.tap_index.shape[1] :])
    return branch_scores(params, hidden, batch), token_score


def scores_and_logps(
    params: CritiqueReward, config: LlavaOnevisionConfig, batch: GroupBatch, compute: Compute
) -> tuple[jax.Array, TokenLogps]:
    """Scores f32 [B, K] and the log-probs [N, S] of every branch's tokens, critiques among them, from one forward."""
    hidden = llava_onevision.hidden_states(params.policy, config, batch, compute)
    return branch_scores(params, hidden, batch), llava_onevision.logps_of(params.policy, hidden, batch, compute)
