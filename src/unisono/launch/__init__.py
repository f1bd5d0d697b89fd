"""The `unisono` command: starts workers, watches over them, replaces the dead, and reports what went wrong, once.

::

    cli        what a person types
    runner     one run from start to exit status
    agent      torch.distributed.elastic's agent, with our rules for failures and stops
    survival   what becomes of a run that can go on without one of its workers
    meeting    where the launchers of several hosts meet, and the store that one of them serves
    board      what launchers and workers tell each other through that store
    processes  the workers' processes, each with everything that it started
    worker     what runs inside each worker: the user's script
    report     failure records, the root cause, and its text
"""
