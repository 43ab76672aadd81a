#!/usr/bin/env bash
# Everything that must pass: style, types, tests. Same environment as the quickstart, with the test tools added.
#
#   bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh demo,qlora,evaluate,data,prepare,serve,bench,dev
bash tests/fetch_tokenizers.sh || echo "Llama 3's tokenizer could not be fetched: its tests are skipped" >&2
ruff check .
ruff format --check .
mypy
# One test process per core, one thread each: small models gain nothing from more.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
first=0 second=0
python -m pytest -n "${TEST_PROCESSES:-2}" -m "not ranks" "$@" || first=$?
# Then those that start several ranks themselves, one after the other.
python -m pytest -m ranks "$@" || second=$?
case "$first $second" in "0 0" | "0 5" | "5 0") exit 0 ;; esac # 5: the arguments select no test of one kind
exit "$((first > 0 && first != 5 ? first : second))"
