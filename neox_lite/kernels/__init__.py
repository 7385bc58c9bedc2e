"""Backends: each implements the same operations on a block's values; dispatch.py holds their table."""
