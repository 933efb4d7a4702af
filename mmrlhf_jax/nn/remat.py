"""The remat ladder: what a layer keeps for its backward pass, from least memory to least recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

RematRung = Literal["full", "attention", "projections", "none"]

_SAVED: dict[RematRung, tuple[str, ...]] = {
    "full": (),  # only the layer's input: everything is computed again
    "attention": ("attention_out",),
    "projections": ("attention_out", "query", "key", "value", "mlp_hidden"),
}


def tag(x: jax.Array, name: str) -> jax.Array:
    """Names an intermediate so that a rung of the ladder may keep it."""
    return checkpoint_name(x, name)


def remat(layer: Callable[..., Any], rung: RematRung) -> Callable[..., Any]:
    """`layer` with the memory policy of a rung; `none` keeps every intermediate."""
    if rung == "none":
        return layer
    if rung not in _SAVED:
        raise ValueError(f"remat {rung!r} is not a rung of the ladder {get_args(RematRung)}")
    policy = jax.checkpoint_policies.save_only_these_names(*_SAVED[rung])
    # prevent_cse is for code outside a scan; inside one it only costs optimisation
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def leaner(rung: RematRung) -> RematRung | None:
    """The next rung down the ladder, which keeps less and computes more; None below the last."""
    ladder = get_args(RematRung)
    place = ladder.index(rung)
    return ladder[place - 1] if place else None
