"""A tokenizer in a GGUF header: byte-level BPE, as llama.cpp splits text before it merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from guardtrain.errors import ModelError

TOKENIZER_FILE = "tokenizer.json"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp knows ways to split text by name; two tokenizers with the same vocabulary and another split give other tokens.
SPLITS = {
    rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
    rf"{_LETTERS}|\p{{N}}|{_REST}": ("qwen2", False),
}


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer in `folder`, padded to `vocab_size` tokens. Raises ModelError for a kind that llama.cpp does not know.

    What it cannot carry: Unicode composition before the split (NFC of Qwen's), which llama.cpp leaves out.
    """
    from gguf import SpecialVocab

    spec = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    _check_kind(spec)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(spec))
    tokens, kinds = _tokens(spec, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    # Whether a sequence begins with a token of its own: what the tokenizer does, not what a reader takes for usual.
    special.add_special_token["bos"] = bool(Tokenizer.from_str(json.dumps(spec)).encode("").ids)
    special.add_to_gguf(writer, quiet=True)


def split_name(spec: dict[str, Any]) -> str:
    """What llama.cpp calls the way in which a tokenizer.json splits text. Raises ModelError."""
    found = spec.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    merges_whole_words = not spec["model"].get("ignore_merges", False)
    *before, last = steps
    is_bytes = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    name: str | None = None
    if is_bytes and last.get("use_regex") and merges_whole_words:
        if not before:
            name = "gpt-2"
        elif before == [{"type": "Digits", "individual_digits": True}]:
            name = "smollm"
    elif is_bytes and len(before) == 1 and before[0].get("behavior") == "Isolated" and not before[0].get("invert"):
        split, ignores = SPLITS.get(before[0].get("pattern", {}).get("Regex", ""), (None, False))
        name = split if ignores is not merges_whole_words else None
    if name is None:
        expected = "the split of GPT-2, SmolLM, Llama 3 or Qwen"
        raise ModelError("llama.cpp knows no tokenizer that splits text like this", where=TOKENIZER_FILE, expected=expected)
    return name


def _check_kind(spec: dict[str, Any]) -> None:
    model, decoder = spec["model"], spec.get("decoder") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or decoder.get("type") != "ByteLevel":
        found = f"{model.get('type')}, decoded by {decoder.get('type')}"
        raise ModelError("this kind of tokenizer cannot be written", where=TOKENIZER_FILE, expected="byte-level BPE", found=found)


def _tokens(spec: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every token's text and kind, by its id."""
    from gguf import TokenType

    texts = {index: text for text, index in spec["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    for token in spec["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if max(texts) >= vocab_size:
        raise ModelError(
            "more tokens than the model has", where=TOKENIZER_FILE, expected=str(vocab_size), found=str(max(texts) + 1)
        )
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    return tokens, [int(kinds.get(index, TokenType.UNUSED)) for index in range(vocab_size)]
