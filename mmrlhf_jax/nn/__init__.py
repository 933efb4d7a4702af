"""Blocks that know no model: parameters, sharding, attention over a group, token log-probabilities, remat."""
