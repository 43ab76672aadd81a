"""The real llama.cpp: its own HTTP server on loopback, in this process, from the package xllamacpp."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHOSEN = 100.0  # added to the logits of two tokens: no third one is left to choose


@dataclass(frozen=True)
class LlamaServer:
    """A running server. Close it by leaving `llama_server`."""

    url: str

    def post(self, path: str, **body: Any) -> Any:
        """What it answers."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=600) as answer:
            return json.load(answer)

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Of a text, with or without the power of special tokens."""
        found: list[int] = self.post("/tokenize", content=text, add_special=False, parse_special=special)["tokens"]
        return found

    def score(self, ids: Sequence[int], malicious: int, benign: int) -> float:
        """logit(malicious) - logit(benign) behind `ids`."""
        found = self.post(
            "/completion",
            prompt=list(ids),
            n_predict=1,
            temperature=1.0,
            samplers=["temperature"],
            n_probs=2,
            post_sampling_probs=True,
            logit_bias=[[malicious, CHOSEN], [benign, CHOSEN]],
        )
        (first,) = found["completion_probabilities"]
        probs = {each["id"]: each["prob"] for each in first["top_probs"]}
        return math.log(probs[malicious]) - math.log(probs[benign])

    def written(self, ids: Sequence[int], most: int) -> str:
        """What it goes on with, greedily."""
        found: str = self.post("/completion", prompt=list(ids), n_predict=most, temperature=0.0)["content"]
        return found


@contextmanager
def llama_server(model: Path, *, chat_template: str = "", context: int = 2048) -> Iterator[LlamaServer]:
    """A server for one GGUF file, in float32 wherever the file is."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel = context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # Its cache holds keys and values in 16 bits unless it is told otherwise.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity, params.port = False, -1, 0
    params.use_jinja, params.chat_template = True, chat_template
    server = xllamacpp.Server(params)
    try:
        yield LlamaServer(server.listening_address)
    finally:
        del server
