"""Benchmarks of a model.

Knows a model, a tokenizer, rows and task names; must not know iterations, stages or services.
"""
