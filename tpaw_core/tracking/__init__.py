"""MLflow: runs, metrics and checkpoint versions, and from them the candidates for a team.

Everything here is idempotent: a run is found again by its tags, a version by its digest. Together with
study/mlflow_runs, the only code that imports mlflow; must not know torch, stages or flows.
"""
