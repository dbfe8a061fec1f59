"""Decoding: rows are read, stepped together, each steered and drawn its own way, and leave when they end."""
