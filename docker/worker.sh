#!/bin/sh
# The worker's container: make the work pool where it is missing, deploy prefect.yaml, work. Repeating is safe.
set -eu
mkdir -p .tpaw  # Prefect makes its home in there, but not the folder around it
prefect work-pool inspect tpaw >/dev/null 2>&1 || prefect work-pool create tpaw --type process
prefect --no-prompt deploy --all
# --limit 1: two runs would write the same files of the workspace.
exec prefect worker start --pool tpaw --type process --name tpaw --limit 1 --with-healthcheck
