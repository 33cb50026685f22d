"""The demo: three guarantees, a store and an inbox on a real Kafka, workers killed at random moments, and everything counted.

``show`` is the program; ``stage`` runs one guarantee; ``worker`` is the process that is killed; ``check`` counts, and is pure.
"""
