"""From an orchestrator to Accelerate: where this host stands, when all are there, and how the ranks ended.

`naign launch` is `launch.main`, `naign render` is in `render`; both are imported only where a command needs them.
"""
