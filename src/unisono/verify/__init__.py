"""Whether a parallel run equals the single-device run; and if not, the step, the tensor and the cause.

`inquiry` asks the questions, `nursery` runs the script as often as they need, `child` and `probe` are what runs inside,
`plain` is the reference that shares no code with the trainer, `causes` finds by experiment what makes a difference.
"""
