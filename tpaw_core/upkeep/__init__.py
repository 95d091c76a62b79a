"""Looking after a workspace: is it consistent, where does a checkpoint come from, what can be deleted.

Knows every artifact, DVC's cache and the registry; must not run a stage.
"""
