"""Serves a library that has no server of its own: `python -I worker_http.py BACKEND.py PORT OPTIONS`.

BACKEND.py has `open_backend(options) -> backend`, OPTIONS is JSON. The answers are those of vLLM's
`/v1/completions`, for token ids alone. Imports nothing but the standard library and BACKEND.py: it runs in the library's
environment.

A backend has `submit(sent, put) -> cancel`, `scores(ids, model, top)`, `load_adapter(name, folder)` and
`unload_adapter(name)`. `scores` gives for each id but the first its log-probability, and `(id, log-probability)` of the `top`
likeliest. `put` takes `{"choice", "ids", "logprobs", "top", "finish"}`, an exception, or None at the end,
from any thread.
"""

import contextlib
import importlib.util
import json
import os
import queue
import select
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOOK = 0.5  # seconds between two looks whether the client is there


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    backend = None
    key = os.environ.get("SWIFT_WORKER_KEY", "")

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/health":
            self.reply(200, {})
        else:
            self.reply(404, {"error": {"message": f"no such path: {self.path}"}})

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        if self.headers.get("authorization") != f"Bearer {self.key}":
            self.reply(401, {"error": {"message": "another's server"}})
            return
        try:
            if self.path == "/v1/load_lora_adapter":
                self.backend.load_adapter(sent["lora_name"], sent["lora_path"])
                self.reply(200, {})
            elif self.path == "/v1/unload_lora_adapter":
                self.backend.unload_adapter(sent["lora_name"])
                self.reply(200, {})
            elif self.path != "/v1/completions":
                self.reply(404, {"error": {"message": f"no such path: {self.path}"}})
            elif sent.get("prompt_logprobs") is not None:
                scored = self.backend.scores(sent["prompt"], sent["model"], sent["prompt_logprobs"])
                told = [
                    {str(i): {"logprob": value} for i, value in [(token, own), *top]}
                    for token, (own, top) in zip(sent["prompt"][1:], scored, strict=True)
                ]
                self.reply(200, {"choices": [{"index": 0, "prompt_logprobs": [None, *told]}]})
            else:
                self.complete(sent)
        except OSError:
            self.close_connection = True  # the client went away
        except Exception as err:
            self.reply(400 if isinstance(err, ValueError) else 500, {"error": {"message": f"{type(err).__name__}: {err}"}})

    def complete(self, sent):
        arrived = queue.SimpleQueue()
        cancel = self.backend.submit(sent, arrived.put)
        usage = {"prompt_tokens": len(sent["prompt"]), "completion_tokens": 0}
        try:
            if sent.get("stream"):
                self.stream(arrived, usage)
                return
            whole = {}
            for event in self.events(arrived):
                choice = whole.setdefault(event["choice"], {"ids": [], "logprobs": [], "top": [], "finish": None})
                for name in ("ids", "logprobs", "top"):
                    choice[name] += event.get(name) or []
                choice["finish"] = event.get("finish") or choice["finish"]
            choices = [told({"choice": number, **choice}) for number, choice in sorted(whole.items())]
            usage["completion_tokens"] = sum(len(choice["token_ids"]) for choice in choices)
            self.reply(200, {"choices": choices, "usage": usage})
        finally:
            cancel()

    def stream(self, arrived, usage):
        first = next(events := self.events(arrived), None)  # a wrong request is told with its status
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.close_connection = True
        self.end_headers()
        try:
            while first is not None:
                usage["completion_tokens"] += len(first.get("ids") or ())
                self.event({"choices": [told(first)]})
                first = next(events, None)
        except OSError:
            raise
        except Exception as err:
            self.event({"error": {"message": f"{type(err).__name__}: {err}"}})
            return
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def events(self, arrived):
        """What the backend tells, until its end. Raises OSError once the client is gone."""
        while True:
            try:
                event = arrived.get(timeout=LOOK)
            except queue.Empty:
                if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionError("the client went away") from None
                continue
            if event is None:
                return
            if isinstance(event, BaseException):
                raise event
            yield event

    def event(self, value):
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def reply(self, status, value):
        content = json.dumps(value).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)


def told(event):
    """A piece of a choice as vLLM tells it, tokens by their ids."""
    ids = event.get("ids") or []
    top = [{f"token_id:{i}": value for i, value in pairs} for pairs in event.get("top") or []]
    logprobs = {
        "tokens": [f"token_id:{i}" for i in ids], "token_logprobs": event.get("logprobs") or [], "top_logprobs": top,
    }  # fmt: skip
    return {
        "index": event["choice"], "text": "", "token_ids": ids, "logprobs": logprobs, "finish_reason": event.get("finish"),
    }  # fmt: skip


def main():
    path, port, options = sys.argv[1:4]
    spec = importlib.util.spec_from_file_location("backend", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Handler.backend = module.open_backend(json.loads(options))
    ThreadingHTTPServer.request_queue_size = 512
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    server.daemon_threads = True
    print("ready", flush=True)
    server.serve_forever(0.1)


if __name__ == "__main__":
    main()
