"""The reward model's key table: the policy's, and the head under the names MM-RLHF's released code gives it."""

from mmrlhf_jax.models.key_table import Key
from mmrlhf_jax.models.llava_onevision.names import REWARD_HEAD
from mmrlhf_jax.models.llava_onevision.weights import KEYS as POLICY_KEYS

KEYS = [
    *POLICY_KEYS,
    # linear
    Key("head.kernel", f"{REWARD_HEAD}weight", "o d -> d o"),
    Key("head.bias", f"{REWARD_HEAD}bias"),
    # Linear-tanh-Linear
    Key("head.dense_kernel", f"{REWARD_HEAD}dense.weight", "e d -> d e"),
    Key("head.dense_bias", f"{REWARD_HEAD}dense.bias"),
    Key("head.out_kernel", f"{REWARD_HEAD}out_proj.weight", "o d -> d o"),
    Key("head.out_bias", f"{REWARD_HEAD}out_proj.bias"),
]
