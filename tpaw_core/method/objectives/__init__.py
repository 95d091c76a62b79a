"""The training objectives: log-probabilities in, losses and rewards out. One objective per file."""
