"""One server for all cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from calling import Api
from server_process import serving
from serving_data import tone_vectors

from mechanex.engine.models.resolve import load


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    local: Any = load("mx-tiny", backend="transformers")
    folder = tmp_path_factory.mktemp("vectors")
    tone_vectors(local.model, local.tokenizer, folder, ["calm_angry"])
    home = tmp_path_factory.mktemp("home")
    with serving("--vectors", str(folder), "--behaviors", "calm_angry", home=home) as running:
        yield Api(running.port)
