"""Code shared by the examples: models, data, training steps, peers, statistics and plots."""
