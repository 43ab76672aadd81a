#!/usr/bin/env bash
# From nothing but Python 3.11+ to a trained guard: makes .venv, installs, runs `guardtrain quickstart`.
#
#   bash launch/quickstart.sh [KEY=VALUE …] [--out DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh demo,evaluate
guardtrain quickstart "$@"
