#!/usr/bin/env bash
# ruff's rules and format, as pyproject.toml sets them.   bash tools/lint.sh [--fix]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/env.sh --extras test
if [ "${1:-}" = --fix ]; then
    ruff check --fix .
    exec ruff format .
fi
ruff check .
ruff format --check .
