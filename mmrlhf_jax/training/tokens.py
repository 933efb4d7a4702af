"""A batch's single tokens, as objectives that weigh them see them: the slots of a group end to end."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmrlhf_jax.batch import GroupBatch
from mmrlhf_jax.objectives import Tokens


def group_tokens(
    batch: GroupBatch, logp: jax.Array, reference_logp: jax.Array, collision: jax.Array | None = None
) -> Tokens:
    """Values f32 [N, S] of rows folded back into their groups: [B, T], T = S, or 2 S in pairs mode."""
    groups, responses = batch.response_mask.shape
    p, here = batch.tap_index.shape[1], batch.branch_end.shape[1]
    rows = batch.branch.shape[0] // groups
    branch = batch.branch[:, p:]
    first = (jnp.arange(batch.branch.shape[0]) % rows)[:, None] * here  # the response that a row begins with
    changed = None
    if batch.changed is not None:
        changed = jnp.moveaxis(batch.changed.reshape(groups, rows, responses, -1), 1, 2).reshape(groups, responses, -1)
    return Tokens(
        token=_folded(batch.token[:, p:], groups),
        response=_folded(jnp.where(branch < here, branch + first, responses), groups),
        weight=_folded(batch.loss_weight, groups),
        logp=_folded(logp, groups),
        reference_logp=_folded(reference_logp, groups),
        changed=changed,
        collision=None if collision is None else _folded(collision, groups),
    )


def _folded(values: jax.Array, groups: int) -> jax.Array:
    return values.reshape(groups, -1)
