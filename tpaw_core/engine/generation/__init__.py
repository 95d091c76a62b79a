"""Generation: one response for every prompt, by transformers in this process or by vllm in its own interpreter.

Knows models, token ids and how answers end; must not know rows, teams or stages.
"""
