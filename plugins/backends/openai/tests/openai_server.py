"""A small server that behaves as OpenAI's API is documented: tokens are bytes, and it says what it was told.

`faults` are answers given before good ones; `seen` are the bodies it was sent. Dialect vllm adds what vLLM documents.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LOGPROB = -0.25


@dataclass
class Fake:
    models: list[str] = field(default_factory=lambda: ["parrot"])
    owner: str = "somebody"
    key: str | None = None
    faults: list[tuple[int, dict[str, str], str]] = field(default_factory=list)  # status (0: hang up), headers, text
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    break_after: int | None = None  # events of a stream
    delay: float = 0.0  # before an answer, and between events
    busy: int = 0
    most_busy: int = 0
    hung_up: int = 0  # streams whose client went away
    url: str = ""


def answer(sent: dict[str, Any], choice: int) -> dict[str, Any]:
    """What is said: text and tool calls."""
    if sent.get("tools"):
        name = sent["tools"][0]["function"]["name"]
        return {"text": "", "calls": [{"name": name, "arguments": '{"city": "Paris"}'}]}
    if "prompt" in sent:
        text = bytes(sent["prompt"]).decode()
    else:
        content = sent["messages"][-1]["content"]
        text = content if isinstance(content, str) else json.dumps(content)
    if sent.get("response_format", {}).get("type") == "json_schema":
        text = json.dumps({"said": text})
    if sent.get("seed") is not None:
        text = f"{sent['seed']}.{choice} {text}"
    for stop in sent.get("stop") or ():
        text = text.split(stop)[0]
    return {"text": text, "calls": []}


def told_logprobs(sent: dict[str, Any], ids: list[int], chat: bool) -> Any:
    numbered = sent.get("return_tokens_as_token_ids")
    names = [f"token_id:{i}" if numbered else chr(i) for i in ids]
    many = (sent.get("top_logprobs") if chat else sent.get("logprobs")) or 0
    top = [
        {name: LOGPROB, **{(f"token_id:{n}" if numbered else f"#{n}"): LOGPROB - 1 - n for n in range(many - 1)}}
        for name in names
    ]
    if chat:
        content = [
            {
                "token": name,
                "logprob": LOGPROB,
                "top_logprobs": [{"token": t, "logprob": p} for t, p in found.items()] if many else [],
            }
            for name, found in zip(names, top, strict=True)
        ]
        return {"content": content} if sent.get("logprobs") else None
    if sent.get("logprobs") is None:
        return None
    return {"tokens": names, "token_logprobs": [LOGPROB] * len(ids), "top_logprobs": top if many else None}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        if self._fault() or self._refused():
            return
        if self.path == "/v1/models":
            self._json(
                200, {"object": "list", "data": [{"id": name, "owned_by": self.fake.owner} for name in self.fake.models]}
            )
        else:
            self._json(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fake = self.fake
        fake.headers.append({key.lower(): value for key, value in self.headers.items()})
        if self._fault() or self._refused():
            return
        fake.seen.append(sent)
        if sent["model"] not in fake.models:
            self._json(404, {"error": {"message": f"The model `{sent['model']}` does not exist", "type": "NotFoundError"}})
            return
        fake.busy += 1
        fake.most_busy = max(fake.busy, fake.most_busy)
        try:
            time.sleep(fake.delay)
            self._stream(sent) if sent.get("stream") else self._whole(sent)
        except OSError:  # the client went away
            fake.hung_up += 1
        finally:
            fake.busy -= 1

    def _choices(self, sent: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any], list[int], str]]:
        for choice in range(sent.get("n", 1)):
            found = answer(sent, choice)
            ids = list(found["text"].encode())
            limit = sent.get("max_tokens", sent.get("max_completion_tokens", 16))
            finish = "tool_calls" if found["calls"] else "stop" if len(ids) <= limit else "length"
            yield choice, found, ids[:limit], finish

    def _usage(self, sent: dict[str, Any], made: int) -> dict[str, Any]:
        asked = len(sent["prompt"]) if "prompt" in sent else len(sent["messages"])
        return {"prompt_tokens": asked, "completion_tokens": made, "prompt_tokens_details": {"cached_tokens": 1}}

    def _whole(self, sent: dict[str, Any]) -> None:
        chat, choices, made = "messages" in sent, [], 0
        for number, found, ids, finish in self._choices(sent):
            made += len(ids)
            echo = list(sent["prompt"]) if sent.get("echo") else []
            choice: dict[str, Any] = {"index": number, "finish_reason": finish}
            logprobs = told_logprobs(sent, [*echo, *ids], chat)
            if echo and logprobs:
                logprobs["token_logprobs"][0] = None
            choice["logprobs"] = logprobs
            text = bytes(ids).decode(errors="ignore")
            if chat:
                choice["message"] = {"role": "assistant", "content": text or None}
                if found["calls"]:
                    choice["message"]["tool_calls"] = [
                        {"id": "c1", "type": "function", "function": call} for call in found["calls"]
                    ]
            else:
                choice["text"] = text
            if sent.get("return_token_ids"):
                choice["token_ids"] = ids
            if sent.get("prompt_logprobs") is not None:
                rest = [{str(i): {"logprob": -float(i)}} for i in sent["prompt"][1:]]
                choice["prompt_logprobs"] = [None, *rest]
            choices.append(choice)
        self._json(200, {"choices": choices, "usage": self._usage(sent, made)})

    def _stream(self, sent: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        chat, made, written = "messages" in sent, 0, 0
        try:
            for number, found, ids, finish in self._choices(sent):
                made += len(ids)
                pieces: list[dict[str, Any]] = []
                for call in found["calls"]:
                    begun = {"index": 0, "id": "c1", "function": {"name": call["name"], "arguments": ""}}
                    pieces.append({"delta": {"tool_calls": [begun]}})
                    pieces += [
                        {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": c}}]}} for c in call["arguments"]
                    ]
                for i in ids:
                    piece: dict[str, Any] = {"logprobs": told_logprobs(sent, [i], chat)}
                    piece |= {"delta": {"content": chr(i)}} if chat else {"text": chr(i)}
                    pieces.append(piece | ({"token_ids": [i]} if sent.get("return_token_ids") else {}))
                pieces.append(({"delta": {}} if chat else {"text": ""}) | {"finish_reason": finish})
                for piece in pieces:
                    if written == self.fake.break_after:
                        return
                    time.sleep(self.fake.delay)
                    self._event({"choices": [{"index": number, "finish_reason": None, **piece}]})
                    written += 1
            if sent.get("stream_options", {}).get("include_usage"):
                self._event({"choices": [], "usage": self._usage(sent, made)})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.fake.hung_up += 1
        self.close_connection = True

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _fault(self) -> bool:
        if not self.fake.faults:
            return False
        status, headers, text = self.fake.faults.pop(0)
        if status == 0:
            self.close_connection = True
            return True
        self.send_response(status)
        for name, value in {"content-length": str(len(text.encode())), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())
        return True

    def _refused(self) -> bool:
        key = self.fake.key
        if key is None or self.headers.get("authorization") == f"Bearer {key}":
            return False
        self._json(401, {"error": {"message": f"Incorrect API key provided: {self.headers.get('authorization')}"}})
        return True

    def _json(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(**settings: Any) -> Iterator[Fake]:
    """The server on a free port of this machine, for as long as the context lasts."""
    fake = Fake(**settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": fake}))
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
