"""``unisono report``: a run directory as one self-contained HTML page.

``run_data`` and ``attachments`` read, ``run_figures`` and ``charts`` draw, ``run_page`` says what was found, ``comparison`` sets
runs beside each other, ``page`` puts it all into one file, ``server`` serves it live. Everything here is *local*, and nothing in
a run directory can stop it.
"""
