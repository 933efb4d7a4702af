"""Side-by-side timings: each case is one process, one run, interleaved repeats."""
