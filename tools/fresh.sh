#!/usr/bin/env bash
# What a newcomer runs, in environments that hold nothing else: each extra's import, the demo in short, the README's
# command lines.   bash tools/fresh.sh
#
# The tests' environment has every package, and would hide one that an extra lacks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" HF_HUB_OFFLINE=1

# What is there without any extra, and what each of them adds; the extra `test` is tools/test.sh's.
declare -A uses=(
    [plain]='import peft_fx; peft_fx.LoraConfig; peft_fx.get_peft_model; peft_fx.capture'
    [adamss]='import peft_fx, torch
graph = peft_fx.capture(torch.nn.Sequential(torch.nn.Linear(8, 8)), (torch.ones(2, 8),))
peft_fx.apply(graph, {"peft_type": "ADAMSS", "target_modules": ["0"]})'
    [gguf]='import peft_fx, smollm2; smollm2.load()'
)

in_environment() { # NAME COMMAND...: in the environment of one extra, made when it is first asked for
    local name="$1" command=("${@:2}")
    (
        export PEFT_FX_VENV="$scratch/$name"
        set -- # a script that is sourced without arguments gets the function's
        [ "$name" = plain ] || set -- --extras "$name"
        . tools/env.sh "$@"
        "${command[@]}"
    )
}

readme_commands() { # the first bash block under the heading
    awk '/^## From the command line/ {here = 1} here && /^```$/ {exit} block; here && /^```bash/ {block = 1}' README.md
}

for name in plain adamss gguf; do
    echo "fresh: $name"
    PYTHONPATH=tools in_environment "$name" python -W error::ImportWarning -c "${uses[$name]}"
done
echo "fresh: the demo in short"
in_environment gguf python tools/demo.py --quick
echo "fresh: the README's command lines"
commands="$(readme_commands)"
[ -n "$commands" ] || { echo "fresh: README.md has no command lines" >&2; exit 1; }
in_environment gguf bash -euxo pipefail -c "$commands"
echo "fresh: all of it runs"
