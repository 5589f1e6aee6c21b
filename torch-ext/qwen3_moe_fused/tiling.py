"""Tile choice (pure Python)."""

MIN_BLOCK_M = 16
