"""uvicorn: what its documentation doesn't name."""

from __future__ import annotations

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["H11Protocol", "forget_signals"]
# Of the protocol, the server uses: connections, transport, loop, cycle and its response_complete, connection_made,
# data_received, connection_lost and on_response_complete. Of the server: startup, shutdown, started and should_exit.


def forget_signals(server: uvicorn.Server) -> None:
    """Keeps a server from raising the signals again that ended it, which would make a clean end look like a failure."""
    server._captured_signals.clear()
