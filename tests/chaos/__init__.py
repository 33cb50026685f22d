"""Real processes on a real Kafka, and faults: a worker, a harness that hurts it, and checks of what is left."""
