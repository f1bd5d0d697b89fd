"""The `unisono` command: starts workers, watches over them, replaces the dead, and reports what went wrong, once.

::

    cli        what a person types
    runner     one run from start to exit status
    agent      torch.distributed.elastic's agent, with our rules for failures and stops
    survival   what becomes of a run that can go on without one of its workers
    meeting    where the launchers of several hosts meet, and the store that one of them serves
    board      what launchers and workers tell each other through that store
    statuses   exit statuses by which workers tell how they ended
    processes  the workers' processes, each with everything that it started
    guard      ends the workers if the launcher itself is killed
    nursery    one process that has imported PyTorch, from which workers are forked
    parent     what runs inside that process
    messages   how the two talk
    worker     what runs inside each worker: the user's script
    report     failure records, the root cause, and its text
"""
