"""Who takes part, and since when: membership that changes while a run goes on.

A *generation* is a period with fixed membership. A worker that dies, hangs, leaves or joins ends it; those who are left meet
again through a store that the launcher serves, and begin the next one.

::

    membership  the meeting: who is in the next generation
    recovery    what a trainer does between two generations, so that no step is lost
    holdings    what the workers of a host hold in common, and a copy of it for the worst case
"""
