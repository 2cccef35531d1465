"""The checks of a contribution that need neither pytest nor a model: light imports, explained options, marked hooks.

Each takes a contribution and returns what is wrong with it, or the empty string.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from swift_core.activate import Activator, load_object
from swift_core.config import describe_options
from swift_core.registry import Contribution

HEAVY = ["torch", "transformers", "peft", "accelerate", "datasets", "deepspeed", "vllm", "ray", "numpy", "pandas"]
WALL = f"""
import importlib, sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ImportError(name + " is imported at module level; import it inside the hook")
sys.meta_path.insert(0, Wall())
"""


def walled(code: str) -> str:
    """Run Python code in a process of its own, where heavy libraries cannot be imported; its error's last line, or ""."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", WALL + code], env=env, capture_output=True, text=True, timeout=120)
    return done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}" if done.returncode else ""


def imports_nothing_heavy(contribution: Contribution) -> str:
    manifest, entry = contribution.plugin.manifest, contribution.entry
    dotted = [manifest and manifest.hooks, entry.config, entry.options.get("source"), entry.options.get("target")]
    return walled("".join(f"importlib.import_module({name.partition(':')[0]!r})\n" for name in dotted if name))


def options_have_help(contribution: Contribution) -> str:
    cls = load_object(contribution.entry.config, contribution) if contribution.entry.config else None
    silent = [name for name, _, _, text in describe_options(cls) if not text.strip()]
    return f"no help text: {', '.join(silent)}" if silent else ""


def hooks_are_marked(contribution: Contribution) -> str:
    (activator := Activator()).activate([contribution])  # refuses a hook that it does not know
    hooks = vars(activator.manager.get_plugin(contribution.plugin.name) or object)
    bare = [name for name, value in hooks.items() if name.startswith("swift_") and not hasattr(value, "swift_impl")]
    return f"without @hookimpl: {', '.join(bare)}" if bare else ""


STATIC: tuple[Callable[[Contribution], str], ...] = (imports_nothing_heavy, options_have_help, hooks_are_marked)
