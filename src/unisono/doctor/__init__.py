"""`unisono doctor`: checks what a run depends on, and says of each thing whether it is fine, or what to do.

::

    command      what `unisono doctor` does, alone or as one worker of a launcher
    local        two workers for a doctor that is alone
    examination  what the workers find out together
    machine      the host and its processor time, from psutil and the cgroups   (no torch)
    build        PyTorch, its math libraries and GPUs
    links        what messages between workers cost, through the real transports
    storage      the run directory                                             (no torch)
    facts        everything that was found out, and its JSON                   (no torch)
    checks       facts about one host -> findings                              (no torch)
    comparisons  facts about links, clocks and several hosts -> findings       (no torch)
    report       findings -> table or JSON                                     (no torch)
"""
