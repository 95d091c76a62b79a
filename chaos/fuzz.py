"""Hostile input, sought by coverage: whatever the bytes, a clear error or right behaviour, and never a hang.

    make fuzz TARGET=jsonl SECONDS=1200

An input that raises anything but TpawError, or takes ten seconds, ends the run and is left in the current folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tpaw_core"]):
    from chaos import targets
    from tpaw_core.errors import TpawError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(targets.TARGETS))
    parser.add_argument("--seconds", type=int, default=1200, help="of processor time")
    arguments = parser.parse_args()
    left = Path.cwd()
    os.chdir(tempfile.mkdtemp(prefix="tpaw-fuzz-"))
    inputs = Path("inputs")
    inputs.mkdir()
    for number, seed in enumerate(targets.seeds(arguments.target)):
        (inputs / str(number)).write_bytes(seed)

    def once(content: bytes) -> None:
        try:
            targets.TARGETS[arguments.target][0](content)
        except TpawError as error:
            if not str(error).strip():
                raise AssertionError("an error that says nothing") from error
        if time.process_time() > arguments.seconds:
            os.kill(os.getpid(), signal.SIGTERM)  # libFuzzer prints its figures and ends

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # rows that are left out are said; libFuzzer writes to stderr
    options = ["-timeout=10", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={left}/{arguments.target}-", str(inputs)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
