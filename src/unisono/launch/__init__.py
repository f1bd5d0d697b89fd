"""The `unisono` command: starts the workers of this host, watches over them, and reports what went wrong, once.

::

    cli        what a person types
    runner     one run from start to exit status
    agent      torch.distributed.elastic's agent, with our rules for failures and stops
    processes  the workers' processes, each with everything that it started
    guard      ends the workers if the launcher itself is killed
    nursery    one process that has imported PyTorch, from which workers are forked
    parent     what runs inside that process
    messages   how the two talk
    worker     what runs inside each worker: the user's script
    report     failure records, the root cause, and its text
"""
