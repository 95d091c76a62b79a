"""Methods side by side on one recipe: what runs, what came out, and what can be said about it.

Knows the stages, and dvc.yaml as their graph; must not know DVC, Prefect or how a stage computes.
"""
