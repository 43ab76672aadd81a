"""A real small model behind `/v1/completions` on loopback: token ids in, greedy text and log-probabilities out.

shape: "vllm" gives what `logprob_token_ids` asks for, "llama.cpp" a list of the likeliest tokens with their numbers, "top" the
likeliest tokens by their text. A random model's labels are not among these, but where they are named as `always`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@dataclass
class CompletionsServer:
    """always: tokens that it gives beside the likeliest. status: of every answer. bodies: what was sent. url: with /v1."""

    model: Any
    tokenizer: Any
    shape: str = "vllm"
    always: tuple[int, ...] = ()
    status: int = 200
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """One choice, as the server of that shape writes it."""
        with self.lock:
            ids, written, first_V = list(body["prompt"]), [], None
            finish = "length"
            while len(written) < body["max_tokens"]:
                logits_V = self._logits(ids + written)
                first_V = logits_V if first_V is None else first_V
                token = int(logits_V.argmax())
                written.append(token)
                if token == self.tokenizer.eos_token_id or any(s in self.tokenizer.decode(written) for s in body.get("stop", ())):
                    finish = "stop"
                    break
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        for stop in body.get("stop", ()):
            text = text.split(stop)[0]
        choice = {"text": text, "finish_reason": finish, **({"token_ids": written} if self.shape == "vllm" else {})}
        return {**choice, "logprobs": self._logprobs(first_V, body)} if body.get("logprobs") else choice

    @torch.inference_mode()
    def _logits(self, ids: list[int]) -> Any:
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]

    def _logprobs(self, logits_V: Any, body: dict[str, Any]) -> dict[str, Any]:
        logprobs_V = logits_V.log_softmax(-1)
        top = [*logprobs_V.topk(20).indices.tolist(), *self.always]
        if self.shape == "vllm":
            tokens = dict.fromkeys([*top[:1], *body.get("logprob_token_ids", top)])
            return {"top_logprobs": [{f"token_id:{token}": float(logprobs_V[token]) for token in tokens}]}
        if self.shape == "llama.cpp":
            entries = [{"id": t, "token": self.tokenizer.decode([t]), "logprob": float(logprobs_V[t])} for t in top]
            return {"content": [{"id": top[0], "top_logprobs": entries}]}
        return {"top_logprobs": [{self.tokenizer.decode([token]): float(logprobs_V[token]) for token in reversed(top)}]}


@contextmanager
def completions_server(model: Any, tokenizer: Any, **options: Any) -> Iterator[CompletionsServer]:
    """The server while it runs."""
    server = CompletionsServer(model, tokenizer, **options)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "guard"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.bodies.append(body)
            server.keys.append(self.headers.get("Authorization"))
            self._send({"choices": [server.answer(body)]} if self.path.endswith("/v1/completions") else {})

        def _send(self, tree: dict[str, Any]) -> None:
            data = json.dumps(tree).encode()
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
