"""Starting, watching and ending other processes.

Knows process ids, ports and health checks; must not know stages, models or torch.
"""
