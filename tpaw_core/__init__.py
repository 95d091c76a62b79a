"""tpaw: team-based self-play with dual adaptive weighting (TPAW, arXiv 2605.09922).

Imports nothing itself; each package says what it knows and what it must not know.
"""

__version__ = "0.1.0"
