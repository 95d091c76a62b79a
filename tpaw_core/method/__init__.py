"""The paper's maths: objectives, player weights, teams, early warnings.

Knows numpy, torch and equations; must not know files, models, settings or services.
"""
