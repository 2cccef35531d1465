"""The pytest plugin of swift-core: makes the contracts' assertions explain themselves, and imports nothing else.

The fixtures `tiny_folder` and `tiny_bundle` come from the pytest plugin of swift-plugin-transformers.
"""

import pytest

pytest.register_assert_rewrite("swift_core.testing.contracts")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes over ten seconds")
