"""The ``dead-letters`` command: what is in a dead letter topic, and back with it to where it came from."""
