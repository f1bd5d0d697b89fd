"""``unisono watch``: the report of a run that still trains, on loopback. *Local.*"""
