"""The `unisono` command: starts workers, watches over them, replaces the dead, and reports what went wrong, once.

::

    cli             what a person types
    config          what to run, and how
    runner          one run from start to exit status
    supervisor      starts and watches the workers of this host, from attempt to attempt
    restart_policy  what becomes of a run that can go on without one of its workers
    rendezvous      where the launchers of several hosts meet, and the store that one of them serves
    control_store   what launchers and workers tell each other through that store
    processes       the workers' processes, each with everything that it started
    worker          what runs inside each worker: the user's script
    report          failure records, the root cause, and its text
    logs            the files that hold what workers print
"""
