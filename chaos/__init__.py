"""Deliberate faults: what the project promises when something breaks, tested by breaking it."""
