"""Several engines in step, each rank a process, watched, so that a lost rank is an error and never a hang.

mesh        how many ranks share requests, how many run the same ones
decide      what all ranks do in a step, as a pure function of what each of them reports
beats       what members say of themselves, what is said of one that is lost, how long anybody may take
watchdog    signs of life through the store; who is silent, who is late
group       the ranks of a run: their store, their groups, their agreement on each step
lockstep    the loop of a rank: requests in, steps, outputs out
wire        messages between the ranks and the front end
lines       where ranks call, and the connection to each
front       the front end: requests to ranks, outputs to clients
processes   starts the ranks of one machine, and ends them
serve       the front end behind HTTP; one rank from its start to its end
"""
