#!/bin/sh
# Runs in the worker's container: create the work pool if missing, deploy prefect.yaml, start the worker. Safe to repeat.
set -eu
mkdir -p .tpaw  # Prefect creates its home inside this folder, but not the folder itself
prefect work-pool inspect tpaw >/dev/null 2>&1 || prefect work-pool create tpaw --type process
prefect --no-prompt deploy --all
# --limit 1: two runs at once would write to the same files of the workspace.
exec prefect worker start --pool tpaw --type process --name tpaw --limit 1 --with-healthcheck
