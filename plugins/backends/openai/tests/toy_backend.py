"""A backend for worker_http.py that needs no library: each token is the one before plus one, modulo 256."""

import json
import os
import pathlib
import sys
import threading
import time


def open_backend(options):
    if options.get("fails"):
        print("the toy is broken", file=sys.stderr)
        raise SystemExit(3)
    time.sleep(options.get("slow_start", 0))
    return Toy(options)


class Toy:
    def __init__(self, options):
        self.options = options
        folder = options.get("folder")
        self.adapters = {"base": weight_of(folder)} if folder else {}
        self.cancelled = 0

    def submit(self, sent, put):
        stopped = threading.Event()
        step = self.adapters.get(sent["model"], 1)

        def work():
            for choice in range(sent["n"]):
                token, finish = sent["prompt"][-1], None
                for n in range(sent["max_tokens"]):
                    if stopped.is_set():
                        return
                    time.sleep(self.options.get("delay", 0))
                    token = (token + step) % 256
                    finish = "stop" if token in sent["stop_token_ids"] else "length" if n + 1 == sent["max_tokens"] else None
                    put({"choice": choice, "ids": [token], "logprobs": [-token / 256], "finish": finish})
                    if finish:
                        break
            put(None)

        if sent["prompt"] == [7]:
            raise ValueError("seven is refused")
        if sent["prompt"] == [8]:
            os._exit(9)
        threading.Thread(target=work, daemon=True).start()

        def cancel():
            stopped.set()

        return cancel

    def scores(self, ids, model, top):
        if ids[0] == 99:  # what reached this process of the parent's environment
            seen = any(name.startswith("PYTHON") and name != "PYTHONNOUSERSITE" for name in os.environ)
            return [(float(seen), [])] * (len(ids) - 1)
        step = self.adapters.get(model, 1)
        likeliest = [(n, -n / 256) for n in range(top)]
        return [(-value / 256 * step, likeliest) for value in ids[1:]]

    def load_adapter(self, name, folder):
        if "bad" in folder:
            raise ValueError("it does not fit")
        self.adapters[name] = int(pathlib.Path(folder, "step").read_text()) if name != "base" else weight_of(folder)

    def unload_adapter(self, name):
        del self.adapters[name]


def weight_of(folder):
    """The weight "step" of a checkpoint of the toy's, an int64; its safetensors file is read without a library."""
    places = json.loads(pathlib.Path(folder, "model.safetensors.index.json").read_text())["weight_map"]
    content = pathlib.Path(folder, places["step"]).read_bytes()
    length = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + length])["step"]["data_offsets"]
    return int.from_bytes(content[8 + length + start : 8 + length + end], "little")
