"""A training run, watched: statistics of every parameter at every step."""
