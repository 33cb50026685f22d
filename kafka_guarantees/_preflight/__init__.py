"""What the brokers and topics must be like for a guarantee to hold: asked once, compared with a table, and reported."""

from .asking import preflight
from .report import Finding, PreflightReport
from .starting import AtStart, Preflight

__all__ = ["AtStart", "Finding", "Preflight", "PreflightReport", "preflight"]
