"""Benchmarks: every operator against the hardware's floor and every installed peer (docs/bench.md).

A parent process watches a worker (``run``), which measures case after case (``cases``): it makes random inputs
(``inputs``), checks every contender against float64 (``peers``), times those that are right in turns
(``timing``) and relates them to the hardware (``floors``). What comes back are rows (``records``), shown as tables.
"""
