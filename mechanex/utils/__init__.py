"""Documented helper functions."""
