"""Supervised fine-tuning and self-play on transformers.Trainer, with one model in memory.

Knows token ids and objectives; must not know where rows come from or what becomes of the model.
"""
