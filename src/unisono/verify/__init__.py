"""Whether a parallel run equals the single-device run; and if not, the step, the tensor and the cause.

`inquiry` asks the questions and `runs` answers them by running the script, in processes from `servers`. `child`, `probe` and
`watch` run inside those processes. `plain` is the reference, which shares no code with the trainer. `causes` and `reference` find
by experiment what makes a difference.
"""
