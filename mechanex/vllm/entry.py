"""``python -m mechanex.vllm.entry``: vLLM's OpenAI server, with the arguments of ``vllm serve``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Serves until SIGINT or SIGTERM."""
    from .._private.vllm import server_main

    server_main(sys.argv[1:])


if __name__ == "__main__":
    main()
