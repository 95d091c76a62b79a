"""What a person reads about a run: one row per checkpoint, and plots of what the iterations did.

Reads what stages left behind, at any time; must not run anything.
"""
