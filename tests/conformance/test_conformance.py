"""The table of what clients expect, run over a socket against a running server."""

from __future__ import annotations

import cases_apis  # noqa: F401
import cases_inside  # noqa: F401
import cases_sampling  # noqa: F401  each adds its lines to the table
import cases_structured  # noqa: F401
import cases_tokens  # noqa: F401
import cases_tools  # noqa: F401
import pytest
from calling import CASES, Api, Case


@pytest.mark.parametrize("line", CASES, ids=lambda line: f"{line.client}: {line.right}")
def test_clients_get_what_they_expect(api: Api, line: Case) -> None:
    line.check(api)
