#!/usr/bin/env bash
# tests/storage beside each quantization package, in an environment of its own.   bash tools/quantizers.sh FOLDER [package ...]
#
# Environments (FOLDER/<package>) are made once, with torch, transformers and pytest of constraints.txt: a package may bring
# other versions of anything but torch and transformers. Logs lie beside them. Ends with a table: package, version, what the
# tests said; or the step that failed, with the last line of its log. LIMIT: seconds that a step may take (1800).
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(realpath -m "${1:?usage: bash tools/quantizers.sh FOLDER [package ...]}")"
shift
mkdir -p "$folder"

# package -> what pip is asked for. gptqmodel: 7.7.0 wants a newer torch; transformers reads GPTQ through optimum.
# optimum-quanto compiles its unpacking with ninja; neural-compressor-pt does not declare accelerate.
declare -A wanted=(
    [bitsandbytes]="bitsandbytes"
    [torchao]="torchao"
    [optimum-quanto]="optimum-quanto ninja"
    [hqq]="hqq"
    [aqlm]="aqlm[cpu]"
    [neural-compressor-pt]="neural-compressor-pt accelerate"
    [autoawq]="autoawq"
    [gptqmodel]="gptqmodel==7.6.0 optimum"
)
# The order in which they run: the fast ones first.
all=(torchao bitsandbytes optimum-quanto hqq aqlm neural-compressor-pt autoawq gptqmodel)
[ $# -gt 0 ] || set -- "${all[@]}"

grep -E '^(torch|transformers)==' "$root/tools/constraints.txt" > "$folder/pins.txt"
limit() { timeout "${LIMIT:-1800}" "$@"; }

# The environment of a package: its own pip, the constraints for what is ours, the pins alone for what is the package's.
make_environment() {
    local package="$1" venv="$folder/$1"
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install -q)
    if [ -e "$venv/ready" ]; then  # of another checkout, perhaps
        [ "$(cat "$venv/ready")" = "$root" ] || limit "${pip[@]}" --no-build-isolation --no-deps -e "$root" || return
        echo "$root" > "$venv/ready"
        return
    fi
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv" || return
    limit "${pip[@]}" -c "$root/tools/constraints.txt" torch setuptools &&
        limit "${pip[@]}" -c "$root/tools/constraints.txt" --no-build-isolation pytest transformers -e "$root" &&
        PIP_CONSTRAINT="$folder/pins.txt" limit "${pip[@]}" ${wanted[$package]} || return
    # With Triton installed, autoawq launches its kernels on a CPU, too, and fails.
    [ "$package" != autoawq ] || "$venv/bin/python" -m pip uninstall -q -y triton || return
    echo "$root" > "$venv/ready"
}

rows=("| package | version | tests/storage |" "|---|---|---|")
failed=0
for package in "$@"; do
    [ -n "${wanted[$package]:-}" ] || { echo "quantizers: no package '$package'; there are ${all[*]}" >&2; exit 2; }
    log="$folder/$package.log"
    echo "quantizers: $package (log: $log)"
    if ! make_environment "$package" > "$log" 2>&1; then
        rows+=("| $package | - | not installed: $(tail -n 1 "$log") |")
        failed=1
        continue
    fi
    version="$("$folder/$package/bin/python" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$package")"
    (cd "$root" && PATH="$folder/$package/bin:$PATH" NUMBA_NUM_THREADS=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
        limit python -m pytest -q -p no:cacheprovider tests/storage) > "$log" 2>&1 || failed=1
    rows+=("| $package | $version | $(tail -n 1 "$log" | tr -d '=') |")
done
printf '%s\n' "${rows[@]}"
exit "$failed"
