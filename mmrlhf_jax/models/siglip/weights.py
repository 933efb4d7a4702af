"""SigLIP's key table: transformers' SiglipVisionTransformer on the right, ours on the left."""

from mmrlhf_jax.models.key_table import Key, prefixed

_LAYER = prefixed(
    [
        Key("attention_norm_scale", "layer_norm1.weight"),
        Key("attention_norm_bias", "layer_norm1.bias"),
        Key("query_kernel", "self_attn.q_proj.weight", "(n h) d -> d n h"),
        Key("query_bias", "self_attn.q_proj.bias", "(n h) -> n h"),
        Key("key_kernel", "self_attn.k_proj.weight", "(n h) d -> d n h"),
        Key("key_bias", "self_attn.k_proj.bias", "(n h) -> n h"),
        Key("value_kernel", "self_attn.v_proj.weight", "(n h) d -> d n h"),
        Key("value_bias", "self_attn.v_proj.bias", "(n h) -> n h"),
        Key("out_kernel", "self_attn.out_proj.weight", "d (n h) -> n h d"),
        Key("out_bias", "self_attn.out_proj.bias"),
        Key("mlp_norm_scale", "layer_norm2.weight"),
        Key("mlp_norm_bias", "layer_norm2.bias"),
        Key("up_kernel", "mlp.fc1.weight", "f d -> d f"),
        Key("up_bias", "mlp.fc1.bias"),
        Key("down_kernel", "mlp.fc2.weight", "d f -> f d"),
        Key("down_bias", "mlp.fc2.bias"),
    ],
    ours="blocks.",
    theirs="encoder.layers.{layer}.",
)

KEYS = [
    Key("patch_kernel", "embeddings.patch_embedding.weight", "d c h w -> h w c d"),
    Key("patch_bias", "embeddings.patch_embedding.bias"),
    Key("position", "embeddings.position_embedding.weight"),
    *_LAYER,
    Key("post_norm_scale", "post_layernorm.weight"),
    Key("post_norm_bias", "post_layernorm.bias"),
]
