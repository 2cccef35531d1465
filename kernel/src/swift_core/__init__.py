"""swift-core: a plugin-based microkernel for fine-tuning large language and multimodal models.

Importing this package imports nothing else; `hookimpl` is made on first use, so that commands that need no plugin
never import pluggy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pluggy

    hookimpl: pluggy.HookimplMarker

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "hookimpl":
        import pluggy

        marker = pluggy.HookimplMarker("swift")
        globals()["hookimpl"] = marker
        return marker
    raise AttributeError(f"module 'swift_core' has no attribute {name!r}")
