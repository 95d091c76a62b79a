"""A connection between the stages and MLflow that can be cut."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

SECONDS_AWAY = 1.0
PATIENCE = 5.0  # seconds to wait for a connection to cut


class Proxy:
    """Forwards bytes from its own port to another one."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: set[socket.socket] = set()
        self._back = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def drop(self) -> bool:
        """Cut every connection as soon as there is one, and accept none for a second; False if none came."""
        deadline = time.monotonic() + PATIENCE
        while not self._pairs:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        self._back = time.monotonic() + SECONDS_AWAY
        for end in list(self._pairs):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return True

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            if time.monotonic() < self._back:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._pairs |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while some := source.recv(1 << 16):
                sink.sendall(some)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._pairs.discard(end)
