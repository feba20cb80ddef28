#!/usr/bin/env bash
# A ready virtual environment: .venv at the repository root, or the one that PEFT_FX_VENV names.
#
#   bash tools/env.sh [--extras test|gguf]        make or renew it
#   . tools/env.sh [--extras test|gguf]           the same, and put its python first on PATH
#
# Needs Python 3.11 or newer with venv and pip (PYTHON names another one than python3). Installs only when
# constraints.txt, pyproject.toml or setup.cfg changed since the last time.

peft_fx_env() {
    local extras="" root venv python wanted stamp
    while [ $# -gt 0 ]; do
        case "$1" in
            --extras) extras="${2:?--extras needs a name: test or gguf}"; shift 2 ;;
            *) echo "env: unknown argument '$1'; use --extras test|gguf" >&2; return 2 ;;
        esac
    done
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return
    venv="${PEFT_FX_VENV:-$root/.venv}"
    python="$venv/bin/python"

    if [ ! -x "$python" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "env: needs Python 3.11 or newer; set PYTHON to one" >&2; return 2; }
        echo "env: making $venv"
        "${PYTHON:-python3}" -m venv "$venv" ||
            { echo "env: could not make $venv (on Debian and Ubuntu: install python3-venv)" >&2; return 2; }
    fi

    # One stamp per set of extras: the demo's smaller set does not undo the tests' larger one.
    stamp="$venv/.peft_fx-${extras:-plain}"
    wanted="$root $(cat "$root/tools/constraints.txt" "$root/pyproject.toml" "$root/setup.cfg" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        local pip=("$python" -m pip --disable-pip-version-check install -qq -c "$root/tools/constraints.txt")
        local torch
        torch="$(grep -E '^torch==' "$root/tools/constraints.txt")" || return
        echo "env: installing $torch (some minutes, where it must be downloaded)"
        "${pip[@]}" "$torch" || { echo "env: could not install $torch" >&2; return 2; }
        echo "env: installing peft_fx${extras:+[$extras]} and what it needs"
        # The build tool comes from the constraints too, hence no isolated build.
        { "${pip[@]}" setuptools && "${pip[@]}" --no-build-isolation -e "$root${extras:+[$extras]}"; } ||
            { echo "env: could not install peft_fx" >&2; return 2; }
        echo "$wanted" > "$stamp"
    fi
    export PATH="$venv/bin:$PATH"
    echo "env: $venv is ready"
}

peft_fx_env "$@"
