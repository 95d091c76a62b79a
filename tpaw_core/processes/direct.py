"""No proxy stands between this machine and itself: HTTP_PROXY is for addresses elsewhere."""

from __future__ import annotations

import os
from urllib.request import proxy_bypass

HOSTS = ("127.0.0.1", "localhost")


def reach_this_machine() -> None:
    """For this process and those that it starts; what else is in NO_PROXY stays."""
    given = os.environ["no_proxy"] = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if not all(map(proxy_bypass, HOSTS)):
        os.environ["no_proxy"] = ",".join(filter(None, (given, *HOSTS)))
    os.environ["NO_PROXY"] = os.environ["no_proxy"]
