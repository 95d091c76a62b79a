"""The connection to the tracking server."""

from __future__ import annotations

import socket
import threading

import pytest

from tpaw_core.errors import Unavailable
from tpaw_core.tracking import client


def test_a_server_that_is_away_for_a_moment_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first two connections are cut, as by a restart."""
    monkeypatch.setattr(client, "SECONDS_AWAY", 30.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                listener.accept()[0].close()
            near, _ = listener.accept()
            near.recv(1 << 16)
            near.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            near.close()

        threading.Thread(target=serve, daemon=True).start()
        client._refuse_if_silent(f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_a_server_that_stays_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SECONDS_AWAY", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(Unavailable, match=rf"127\.0\.0\.1:{port}: no MLflow server answers"):
        client._refuse_if_silent(f"http://127.0.0.1:{port}")
