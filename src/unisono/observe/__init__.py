"""What a person sees of a run, and what the run writes down about itself.

``timing`` measures, ``metrics`` writes a line a logged step, ``progress`` shows the run while it trains, ``summary`` is
what remains at the end. Everything here is *local*: nothing communicates. Only rank 0 shows and writes; the other
workers use ``SilentProgress`` and no log.
"""
