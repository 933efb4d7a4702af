"""MM-RLHF in JAX: multimodal alignment from ranked human preferences, one forward per group."""
