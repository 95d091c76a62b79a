"""Engine calls on several processes: a stage starts them, hands each the same work, and takes in what they make.

Knows how to start, watch and end processes, and how each gets its model; must not know stages, MLflow or DVC. A stage
stays one process: ranks publish nothing, and what they write lies in `.tpaw/launch` until the stage has read it.
"""
