"""One server for all cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from calling import Api
from server_process import serving
from serving_data import tone_vectors

from mechanex.engine.models.resolve import load

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ '<|system|>Call <tool_call>: ' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'tool' %}{{ 'Result: ' }}{% endif %}{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    local: Any = load("mx-tiny", backend="transformers")
    folder = tmp_path_factory.mktemp("vectors")
    # The same model, told of tools as Hermes and Qwen are.
    model = tmp_path_factory.mktemp("models") / "mx-tiny"
    local.model.save_pretrained(model)
    local.tokenizer.chat_template = TEMPLATE
    local.tokenizer.save_pretrained(model)
    tone_vectors(local.model, local.tokenizer, folder, ["calm_angry"])
    home = tmp_path_factory.mktemp("home")
    with serving(
        "--vectors", str(folder), "--behaviors", "calm_angry", home=home, model=str(model)
    ) as running:
        yield Api(running.port)
