"""``python -m mechanex``: say what is installed, which backends run here and why the others don't."""

from __future__ import annotations

import sys

from mechanex.doctor import examine


def main() -> int:
    """Print the report; the exit status is 0."""
    sys.stdout.write(f"{examine()}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
