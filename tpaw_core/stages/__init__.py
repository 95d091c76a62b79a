"""The stages: params and inputs in, engine called, outputs published. Iteration t makes checkpoint t, 0 the SFT model.

A stage writes to a temporary path and renames it into place; bad input is rejected before anything existing is
touched. Knows every package below; must not know DVC or Prefect.
"""
