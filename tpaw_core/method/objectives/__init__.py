"""The training objectives: log-probabilities in, losses and rewards out. One objective per file.

Knows equations; must not know where log-probabilities come from, or the trainer.
"""
