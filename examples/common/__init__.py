"""What the examples share: models, data, training steps, peers, statistics, pictures."""
