"""Running a model: scoring now, generation on top of it."""
