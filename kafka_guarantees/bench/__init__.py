"""``kafka-guarantees bench``: what each guarantee costs on a cluster: throughput, latency, start-up, memory.

How it goes: ``work`` is the process that is measured, on the public API, as its users write it.
"""
