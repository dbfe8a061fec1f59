"""cuDNN's attention stays out of the engine's calls, and the user's choice stays what it was."""

from __future__ import annotations

import pytest
import torch

from mechanex.engine.attention_plans import with_plans, without_plans


@pytest.mark.parametrize("chosen", [True, False])
def test_the_choice_is_put_back(chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(chosen)
        with pytest.raises(ZeroDivisionError), without_plans():
            assert not enabled()
            with without_plans():
                with with_plans():
                    assert enabled() == chosen
                assert not enabled()
            assert not enabled()
            raise ZeroDivisionError
        assert enabled() == chosen
        with with_plans():
            assert enabled() == chosen
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
