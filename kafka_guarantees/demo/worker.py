"""The process that is killed: one client of the public API, which handles offers until it is told to stop.

``python -m kafka_guarantees.demo.worker TASK``, where TASK is a ``Task`` in JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from .effects import EffectLog
from .offers import FLOWS, Task, grant_to


def work(task: Task) -> None:
    """Handle offers until SIGTERM. The class is the only thing in which the guarantees differ."""
    guarantee = {flow.guarantee: flow.kafka for flow in FLOWS}[task.guarantee]
    with EffectLog(Path(task.effects)) as effects, guarantee(task.config) as kafka:
        kafka.run([task.reads], grant_to(effects, task.writes))


def end_with_driver() -> None:
    """End this process when the one that started it is gone: nobody would be left to stop it."""
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written to it: it returns at its end
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_driver, daemon=True).start()
    work(Task(**json.loads(sys.argv[1])))
