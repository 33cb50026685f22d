"""``kafka-guarantees prove``: workers of the real library, on a real cluster, under faults; then their histories are checked.

How a proof goes: ``evidence`` says in which words everything is told; ``worker`` is what is hurt; ``faults`` hurt it, some of
them through ``proxy``; ``reading`` asks the brokers what is there afterwards; ``checks`` judge; ``report`` shows it.
"""
