"""Starts vLLM's own server, with `guard` beside this file in reach of its `--middleware`. Runs in vLLM's environment."""

import pathlib
import runpy
import sys

if __name__ == "__main__":  # not in processes that vLLM spawns, which import this file
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    sys.argv[0] = "vllm"
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
