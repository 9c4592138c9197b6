"""Report: what a run came to, said so that it can be defended.

`reading` takes a run folder apart, `costs` counts what it took, `statistics` and `comparison` make the figures
(paired over seeds, selection counted in), `tables`, `plots` and `page` only show them, and `report` writes them all.
"""
