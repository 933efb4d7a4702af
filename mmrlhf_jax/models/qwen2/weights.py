"""Qwen2's key table: transformers' Qwen2ForCausalLM on the right, ours on the left."""

from mmrlhf_jax.models.key_table import Key, prefixed

_LAYER = prefixed(
    [
        Key("attention_norm", "input_layernorm.weight"),
        Key("query_kernel", "self_attn.q_proj.weight", "(n h) d -> d n h"),
        Key("query_bias", "self_attn.q_proj.bias", "(n h) -> n h"),
        Key("key_kernel", "self_attn.k_proj.weight", "(g h) d -> d g h"),
        Key("key_bias", "self_attn.k_proj.bias", "(g h) -> g h"),
        Key("value_kernel", "self_attn.v_proj.weight", "(g h) d -> d g h"),
        Key("value_bias", "self_attn.v_proj.bias", "(g h) -> g h"),
        Key("out_kernel", "self_attn.o_proj.weight", "d (n h) -> n h d"),
        Key("mlp_norm", "post_attention_layernorm.weight"),
        Key("gate_kernel", "mlp.gate_proj.weight", "f d -> d f"),
        Key("up_kernel", "mlp.up_proj.weight", "f d -> d f"),
        Key("down_kernel", "mlp.down_proj.weight", "d f -> f d"),
    ],
    ours="layers.",
    theirs="model.layers.{layer}.",
)

KEYS = [
    Key("embedding", "model.embed_tokens.weight"),
    *_LAYER,
    Key("norm", "model.norm.weight"),
    Key("unembedding", "lm_head.weight"),  # absent when tied
]
