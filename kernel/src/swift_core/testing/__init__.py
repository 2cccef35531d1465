"""The conformance kit: `from swift_core.testing import TunerContract`, one class for each kind. See contracts.py.

Names load on first use: pytest imports this package in every project of an environment that has swift-core.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if not name.endswith("Contract"):
        raise AttributeError(f"module 'swift_core.testing' has no attribute {name!r}")
    from swift_core.testing import contracts

    return getattr(contracts, name)
