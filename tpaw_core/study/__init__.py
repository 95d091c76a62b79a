"""Methods side by side on one recipe: what runs, what comes out, and which claims hold.

Knows the stages, and dvc.yaml as their graph; must not know DVC, Prefect or how a stage computes.
"""
