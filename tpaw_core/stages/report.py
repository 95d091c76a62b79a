"""report: table and plots of every checkpoint evaluated so far."""

from __future__ import annotations

from tpaw_core.artifacts.metrics import evaluated, read_samples
from tpaw_core.stages.context import Context


def report(context: Context) -> None:
    """Also brings the registry up to date and ends the run. Reads: metrics/, training/. Writes: report/."""
    from tpaw_core.report.page import write

    workspace, registry = context.workspace, context.registry
    with workspace.exclusive("report"):
        with workspace.publish(workspace.report) as aside:
            aside.mkdir()
            write(workspace, aside)
        if registry:
            for iteration, metrics in evaluated(workspace).items():
                if registry.register(iteration) is not None:
                    registry.record_evaluation(iteration, metrics, read_samples(workspace, iteration))
            registry.runs.log_report(workspace.report)
            registry.runs.finish()
