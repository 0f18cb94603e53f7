"""Benches: `pytest bench`, with all options of pytest-benchmark. How they measure is said in support.py."""
