"""The process that is killed: one client of the public API, which handles offers until it is told to stop.

``python -m kafka_guarantees.demo.worker TASK``, where TASK is a ``Task`` in JSON.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import threading
from contextlib import closing
from pathlib import Path

from kafka_guarantees import AtLeastOnce
from kafka_guarantees.dedup import SqliteDedupStore, SqliteInbox

from .effects import EffectLog
from .offers import BOOKED, FLOWS, INBOX, STORE, Task, book_with, grant_to


def work(task: Task) -> None:
    """Handle offers until SIGTERM. Without a store and an inbox, the class is the only thing in which the guarantees differ."""
    with EffectLog(Path(task.effects)) as effects:
        grant = grant_to(effects, task.writes)
        if task.guarantee == STORE:
            with SqliteDedupStore(task.database) as store, AtLeastOnce(task.config, dedup=store) as kafka:
                kafka.run([task.reads], grant)
        elif task.guarantee == INBOX:
            with closing(sqlite3.connect(task.database)) as database:
                database.execute(BOOKED)
            with SqliteInbox(task.database) as inbox, AtLeastOnce(task.config, inbox=inbox) as kafka:
                kafka.run([task.reads], book_with(effects))
        else:
            guarantee = {flow.guarantee: flow.kafka for flow in FLOWS}[task.guarantee]
            with guarantee(task.config) as client:
                client.run([task.reads], grant)


def end_with_driver() -> None:
    """End this process when the one that started it is gone: nobody would be left to stop it."""
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written to it: it returns at its end
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_driver, daemon=True).start()
    work(Task(**json.loads(sys.argv[1])))
