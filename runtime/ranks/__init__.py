"""Several engines in step: one process a data-parallel rank, watched, so that a lost rank is an error and never a hang.

decide      what all ranks do in a step, as a pure function of what each of them reports
group       the ranks of a run: their store, their agreement on each step
watchdog    signs of life through the store; who is silent, who is late
lockstep    the loop of a rank: requests in, steps, outputs out
wire        messages between the ranks and the front end
front       the front end: requests to ranks, outputs to clients
processes   starts the ranks of one machine, and ends them
"""
