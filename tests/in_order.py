"""`python tests/in_order.py PROGRAM ARGUMENTS...`: a program on virtual hosts, its loops over layers unrolled.

XLA's CPU runtime starts the collectives of a program in its order, and those inside a loop when the loop gets there:
loops that do not depend on each other (policy and reference, tower and embedding) run at once, in another order on
each host, and gloo then adds one's numbers to the other's, or waits for ever. Accelerators run a program in one order.
"""

import functools
import runpy
import sys

import jax

jax.lax.scan = functools.partial(jax.lax.scan, unroll=True)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
