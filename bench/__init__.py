"""Benchmarks of effk: every row with the measured roofline, the best competitor of the same run, and a match.

`python -m bench --op wq_linear` prints the table; `pytest bench/` runs the same cases under pytest-benchmark.
"""
