"""The pytest plugin costs other projects nothing, and the contracts are found under `swift_core.testing`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import swift_core.testing
from swift_core.api import KINDS
from swift_core.testing.contracts import run_walled

PROBE = """
import pytest, sys
before = set(sys.modules)
import swift_core.testing.plugin
print(sorted(set(sys.modules) - before))
"""


def test_the_pytest_plugin_imports_nothing_but_itself() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['swift_core', 'swift_core.testing', 'swift_core.testing.plugin']"


def test_every_kind_has_its_contract() -> None:
    for kind, singular in KINDS.items():
        contract = getattr(swift_core.testing, f"{singular.capitalize()}Contract")
        assert contract.kind == kind


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'TunerTest'"):
        swift_core.testing.TunerTest  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'TunaContract'"):
        swift_core.testing.TunaContract  # noqa: B018


def test_the_wall_stops_heavy_imports_and_no_others() -> None:
    run_walled("import json, swift_core.session")
    with pytest.raises(AssertionError, match="torch is imported at module level; import it inside the hook"):
        run_walled("import torch.nn")


def test_kernel_and_contracts_import_behind_the_wall() -> None:
    run_walled("import swift_core.testing.contracts, swift_core.training, swift_core.cli.main, swift_core.cli.scaffold")
