#!/usr/bin/env bash
# The demo: fine-tunes a real small language model on this machine's CPU.   bash tools/demo.sh [demo.py's arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/env.sh --extras gguf
exec python tools/demo.py "$@"
