"""Scores, answers and training steps: what torch and transformers do here.

Runs where only these two are installed. Must not know stages, their files, or services.
"""
