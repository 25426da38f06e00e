"""Weights on disk: reading them, checking them, writing them without losing a file."""
