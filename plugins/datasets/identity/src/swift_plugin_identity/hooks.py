"""Answers the kernel for the data set `identity`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swift_core import hookimpl

from swift_plugin_identity.config import IdentityConfig

if TYPE_CHECKING:
    from swift_core.types import Dataset


@hookimpl
def swift_open_dataset(dataset_id: str, config: IdentityConfig) -> Dataset | None:
    if dataset_id != "identity":
        return None
    from swift_plugin_identity.dataset import IdentityDataset

    return IdentityDataset(config)
