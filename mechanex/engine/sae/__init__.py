"""Sparse autoencoders: read, trained, and asked which of their features tell a behavior."""
