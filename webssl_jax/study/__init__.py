"""A question asked by many runs: cells that are trained and judged, and what follows from them.

``cells`` says what is to be run, ``runner`` runs what is missing, ``results`` reads what the runs
left in their workdirs, ``findings`` states by rules what it shows, and ``page`` writes it down.
``webssl study`` is the command.
"""
