"""`unisono doctor`: checks what a run depends on, and says of each thing whether it is fine, or what to do.

::

    command      what `unisono doctor` does, alone or as one worker of a launcher
    local        two workers for a doctor that is alone
    examination  what the workers find out together
    facts        the machine, as /proc and /sys/fs/cgroup show it        (no torch)
    build        PyTorch, its math libraries and GPUs
    links        what messages between workers cost, through the real transports
    streams      what plain TCP gives between the same workers
    storage      the run directory                                       (no torch)
    checks       facts about one host -> findings                        (no torch)
    comparisons  facts about links, clocks and several hosts -> findings (no torch)
    report       findings -> table or JSON                               (no torch)
"""
