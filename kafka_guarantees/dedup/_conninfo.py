"""Where a PostgreSQL is, as its user says it."""

from __future__ import annotations

import re

import psycopg
from psycopg.conninfo import conninfo_to_dict

_SPOILT = re.compile(r"postgres(ql)?://[^/?]*/[^?]*@")


def options_of(conninfo: str) -> dict[str, str]:
    """What a URL or pairs of key=value say.

    Raises:
        ValueError: they cannot be read. What a password with @ or / in it spoils becomes the host, the port or the database,
            and those are quoted in messages and logs (S01): so it is refused here, without them.
    """
    try:
        options = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    except (psycopg.Error, UnicodeError):  # the latter has the string, too
        options = {"port": "unreadable"}
    port = options.get("port", "").replace(",", "")  # of each host, or none
    if "@" in options.get("host", "")[1:] or not (port.isdigit() or not port) or _SPOILT.match(conninfo):
        raise ValueError(
            "the connection string of PostgreSQL is neither a postgresql:// URL nor pairs of key=value. A URL needs %XX for "
            "special characters, as in a password"
        )
    return options
