"""The settings of a run: params.yaml as a typed tree, with recipes and overrides.

Knows YAML and types; must not know torch, stages or services.
"""
