"""Coverage-guided hostile input: for any bytes, correct behaviour or a clear error, and never a hang.

    make fuzz TARGET=jsonl SECONDS=1200

An input that raises anything but TpawError, or takes ten seconds, ends the run and is saved in the current folder.
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
    folder = Path(tempfile.mkdtemp(prefix="tpaw-fuzz-"))
    inputs = folder / "inputs"
    inputs.mkdir()
    for number, seed in enumerate(targets.seeds(arguments.target)):
        (inputs / str(number)).write_bytes(seed)

    def once(content: bytes) -> None:
        try:
            targets.TARGETS[arguments.target][0](folder, content)
        except TpawError as error:
            if not str(error).strip():
                raise AssertionError("an error without a message") from error
        if time.process_time() > arguments.seconds:
            os.kill(os.getpid(), signal.SIGTERM)  # libFuzzer prints its figures and exits

    options = ["-timeout=10", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={Path.cwd()}/{arguments.target}-", str(inputs)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
