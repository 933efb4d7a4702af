"""One folder a model family: config, pure forward, weight table, renderer."""
