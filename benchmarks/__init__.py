"""Ours beside the clients of others, in one run on one machine: ``python -m benchmarks``. See README.md.

Rules.
    * Only ratios are compared. Contestants take turns on the same topics; each run is a process of its own.
    * Whoever fails or is missing is shown as such, with the reason. What a run claims is looked up on the brokers.
    * Here nothing is measured inside of a contestant: each has its own clock, and says what README.md lays down.
"""
