"""Faults on purpose: what the project promises when something breaks, tried by breaking it."""
