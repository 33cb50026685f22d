"""What every deduplication store and every inbox must do, as pytest classes to inherit from.

    class TestMyStore(DedupStoreConformance):
        def make_store(self, place: Path, retention: timedelta, clock: Clock) -> DedupStore:
            return MyStore(place.name, retention=retention)

Rules.
* ``place`` is a path in a directory of the test: the same place means the same data, also in another process. Its last part is
  unique in the world, and fit to be a file, a table or a prefix.
* Other processes import the class and call it without arguments. What it must know there, an address say, is in ``os.environ``.
* What a store cannot do, its ``capabilities`` say: nothing else is left out, and whatever is says why.

``broken_stores.py`` has stores and inboxes with one mistake each: the suite fails for every one of them.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(f"{__name__}.stores", f"{__name__}.inboxes")  # so that a failure shows the values

from .inboxes import InboxConformance  # noqa: E402
from .stores import Clock, DedupStoreConformance  # noqa: E402

__all__ = ["Clock", "DedupStoreConformance", "InboxConformance"]
