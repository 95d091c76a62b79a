"""Prefect: the order of the stages, retries and progress.

Knows commands and DVC; must not know models, and imports no model library.
"""
