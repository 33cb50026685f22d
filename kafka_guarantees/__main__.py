"""``python -m kafka_guarantees``: the same as the ``kafka-guarantees`` command."""

from __future__ import annotations

import sys

from kafka_guarantees.cli import main

if __name__ == "__main__":
    sys.exit(main())
