"""MLflow: runs, metrics and checkpoint versions, and from them the candidates for a team.

Everything here is idempotent: a run is found again by its tags, a version by its digest. With study/mlflow_runs the
only importer of mlflow; must not know torch, stages or flows.
"""
