"""Checkpoints on disk: reading, quantizing, inspecting and comparing them."""
