"""docs/plugins.md, the hook specifications and the tutorial plugin say the same, in both directions."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from swift_core.api import KINDS
from swift_core.hookspecs import SwiftSpecs
from swift_core.manifest import PART_KINDS

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
SPECS = {name: spec for name, spec in vars(SwiftSpecs).items() if name.startswith("swift_")}
SECTIONS = dict(re.findall(r"^### `(swift_\w+)`\n(.*?)(?=^###? |\Z)", DOCS, flags=re.MULTILINE | re.DOTALL))


def test_every_hook_has_its_section_and_no_section_lacks_its_hook() -> None:
    assert list(SECTIONS) == list(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_the_section_shows_the_exact_signature(name: str) -> None:
    signature = inspect.signature(SPECS[name])
    text = str(signature.replace(parameters=list(signature.parameters.values())[1:])).replace("'", "")
    assert re.findall(r"```python\n(.*?)\n```", SECTIONS[name], flags=re.DOTALL) == [name + text]


@pytest.mark.parametrize("name", SPECS)
def test_every_hook_is_described_with_an_example_that_answers_it(name: str) -> None:
    text = inspect.getdoc(SPECS[name]) or ""
    assert re.search(rf"@hookimpl\n *def {name}\(", text)
    example = text[text.index(f"def {name}(") :].partition(")")[0].partition("(")[2]
    named = [argument.strip() for argument in example.split(",")]
    assert named == list(inspect.signature(SPECS[name]).parameters)[1:]


def test_code_shown_is_the_tutorial_plugins() -> None:
    shown = re.findall(r"^`(examples/[^`]+)`:\n\n```\w+\n(.*?)\n```", DOCS, flags=re.MULTILINE | re.DOTALL)
    assert len(shown) >= 6
    for path, code in shown:
        assert code in (ROOT / path).read_text(encoding="utf-8"), path


def test_every_kind_and_its_contract_are_named() -> None:
    from swift_core.testing import contracts

    kinds = re.search(r"^Kinds: (.*?)\.", DOCS, flags=re.MULTILINE | re.DOTALL)
    assert kinds is not None
    assert kinds[1].split(", ") == list(KINDS.values())
    own = {name for name in vars(contracts) if name.endswith("Contract")} - {"Contract", "HookContract"}
    assert set(re.findall(r"^\| `(\w+Contract)` \|", DOCS, flags=re.MULTILINE)) == own
    assert {contract.kind for contract in (getattr(contracts, name) for name in own)} == set(KINDS)


def test_part_kinds_are_named() -> None:
    listed = f"{', '.join(PART_KINDS[:-1])} or {PART_KINDS[-1]}"
    assert listed in DOCS


def test_the_keys_of_the_manifest_are_named() -> None:
    from swift_core.manifest import _COMMAND, _COMMON, _EXTRA

    table = DOCS[DOCS.index("| key | of | meaning |") : DOCS.index("Ids are exclusive")]
    named = {key for row in table.strip().splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {*_COMMON, *_COMMAND, *(key for extra in _EXTRA.values() for key in extra)}


def test_step_events_are_named() -> None:
    from swift_core.testing.contracts import STEP

    row = next(line for line in DOCS.splitlines() if line.startswith("| `step` |"))
    assert set(re.findall(r"`(\w+)`", row)) == {"step", *STEP}
