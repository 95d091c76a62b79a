"""Rows in, token ids out.

Knows rows, tokenizers and where an answer ends; must not know models, stages or what a stage leaves behind.
"""
