"""Fewer bits: NumPy in, NumPy out, no knowledge of models."""
