"""Ratios against named peers in the same run, and a few plain figures. `python -m benchmarks` runs all of them."""
