"""The folder that a run lives in: where things are, how they are written, who may write.

Knows paths, locks, digests and JSON records; must not know what a stage does with them.
"""
