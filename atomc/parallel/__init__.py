"""Many devices: layouts, collectives and what they cost, tasks on two streams and their timelines."""
