"""How the interpreter is shared in a process that is ours."""

from __future__ import annotations

import sys

# A thread that computes gives the interpreter up to another no sooner; Python's own 5 ms are several batches. A replay's one
# client prepares requests while the loop wants to go on: in replays on an H200 the loop was asleep for 6% of the time with
# this and for 23% without (generated 25%ws, one run each, hours apart). Not for servers: with 64 client threads that all
# want their turn it costs 40% of the requests (benchmarks/bench_loop.py), and with two it changes little.
SWITCH_S = 2e-4


def share_often() -> None:
    """Let the threads of this process take turns several times a batch: for a client and a loop that share a process."""
    sys.setswitchinterval(SWITCH_S)
