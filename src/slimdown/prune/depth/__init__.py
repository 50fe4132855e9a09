"""Removing whole blocks, and branches of blocks."""
