"""Steering in vLLM, request by request: a worker, a scheduler and a middleware that vLLM's own options name.

Importing this doesn't import vLLM; making an :class:`LLM` does.
"""

from .engine_behaviors import WatchBy
from .engine_vectors import SteerBy
from .llm import LLM

__all__ = ["LLM", "SteerBy", "WatchBy"]
