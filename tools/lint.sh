#!/usr/bin/env bash
# ruff's rules and format and mypy's types, as pyproject.toml sets them.   bash tools/lint.sh [--fix]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/env.sh --extras test
if [ "${1:-}" = --fix ]; then
    ruff check --fix .
    exec ruff format .
fi
ruff check .
ruff format --check .
# mypy looks for sub-packages below their package only: a tree of links in which passes/ and kernels/ lie there (setup.cfg)
tree=build/types/peft_fx
rm -rf "$tree"
mkdir -p "$tree"
ln -s "$PWD"/peft_fx/* "$PWD/passes" "$tree"
rm "$tree/kernels.py"
ln -s "$PWD/kernels" "$tree"
cd build/types
mypy --config-file ../../pyproject.toml
