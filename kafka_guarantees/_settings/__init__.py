"""What each guarantee sets, what it refuses, and how both are explained: tables of data, and the code that walks them."""

from .explanation import Explanation
from .librdkafka import check, creation_failure
from .merge import Settings, explain, resolve
from .presets import Guarantee

__all__ = ["Explanation", "Guarantee", "Settings", "check", "creation_failure", "explain", "resolve"]
