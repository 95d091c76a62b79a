"""tpaw: team-based self-play with dual adaptive weighting (TPAW, arXiv 2605.09922)."""

__version__ = "0.1.0"
