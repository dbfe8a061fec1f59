"""The tests that need vLLM; make test-vllm makes their environment. Elsewhere none of these files is looked at."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Before vLLM is imported. One process, unless a test says otherwise: a second one takes as long to start as the engine.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CONFIGURE_LOGGING": os.environ.get("VLLM_CONFIGURE_LOGGING", "0"),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

if find_spec("vllm") is None:
    collect_ignore_glob = ["*"]
else:
    os.environ.update(ENVIRONMENT)

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    from models import save_random

    return save_random(tmp_path_factory.mktemp("llama"))


class Engines:
    """Makes engines one after another: an engine takes the place of the one before."""

    def __init__(self) -> None:
        self._key: Any = None
        self._engine: Any = None

    def __call__(self, folder: Path, **options: Any) -> Any:
        from mechanex.vllm import LLM

        key = (folder, sorted(options.items()))
        if key != self._key:
            self.close()
            self._engine, self._key = LLM(folder, **{**OPTIONS, **options}), key
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            self._engine.engine.llm_engine.engine_core.shutdown()
            self._engine = self._key = None
            gc.collect()
            cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.close()
