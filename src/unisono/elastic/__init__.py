"""Who takes part, and since when: membership that changes while a run goes on.

A *generation* is a period with fixed membership. A worker that dies, hangs, leaves or joins ends it; those who are left meet
again through a store that the launcher serves, and begin the next one.

::

    membership  the meeting: who is in the next generation
    link        a process's tie to the run: its membership, and the transport of each generation

What a trainer does between two generations, so that no step is lost, is in ``training/team.py``; where the state of a lost
worker is found, in ``training/holdings.py``.
"""
