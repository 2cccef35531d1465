"""The plugin API's version, apart from the package's.

A plugin's manifest names the API it was made for. The kernel takes `OLDEST <= api <= API` within one major. Adding a
hook, a field or a hook argument raises the minor; removing or renaming one raises the major.
"""

API = (0, 9)
OLDEST = (0, 9)

KINDS = {
    "models": "model",
    "templates": "template",
    "tuners": "tuner",
    "trainers": "trainer",
    "backends": "backend",
    "engines": "engine",
    "quantizers": "quantizer",
    "evaluators": "evaluator",
    "datasets": "dataset",
    "parts": "part",
    "callbacks": "callback",
    "commands": "command",
}
"""Every kind: the manifest's table -> its singular, as used in configs and messages."""


def parse_api(text: str) -> tuple[int, int]:
    """`"0.9"` -> `(0, 9)`. Raises ValueError when the text is not MAJOR.MINOR."""
    major, dot, minor = text.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise ValueError(f"api must read MAJOR.MINOR, such as {API[0]}.{API[1]}, not {text!r}")
    return int(major), int(minor)


def describe_mismatch(name: str, version: str, api: tuple[int, int], core_version: str) -> str | None:
    """The sentence that says why a plugin made for `api` cannot be used here, and what mends it; None if it can."""
    if api[0] == API[0] and OLDEST <= api <= API:
        return None
    speaks = f"{API[0]}.{API[1]}" if OLDEST == API else f"{OLDEST[0]}.{OLDEST[1]} to {API[0]}.{API[1]}"
    made = f"{name} {version} was made for plugin API {api[0]}.{api[1]}; swift-core {core_version} speaks {speaks}"
    upgrade = "swift-core" if api > API else name
    return f"{made}. Upgrade: pip install -U {upgrade}"
