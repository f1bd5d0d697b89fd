"""``unisono report``: a run directory as one self-contained HTML page.

``run_data`` reads, ``figures`` and ``worker_figures`` draw, ``run_page`` says what was found, ``comparison`` sets runs beside
each other, ``page`` puts it all into one file. Everything here is *local*, and nothing in a run directory can stop it.
"""
