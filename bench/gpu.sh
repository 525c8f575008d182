#!/usr/bin/env bash
# Runs tests and benchmarks on a machine with a GPU, in under ten minutes, without installing anything:
#
#     bench/gpu.sh [PART[=SECONDS] …]
#
# bench/gpu.py describes the parts and the results. PYTHON: the interpreter, by default python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
[[ $python == */* ]] && python=$(realpath -s "$python")
if [[ -n ${OUT:-} ]]; then
  OUT=$(realpath --canonicalize-missing "$OUT")
  export OUT
fi
# A tree laid out like an installation, with kernels/ in the package, and first in PYTHONPATH.
tree=$root/build/tree
rm -rf "$tree"
mkdir -p "$tree/fastnabla"
ln -s "$root"/fastnabla/* "$tree/fastnabla/"
ln -sfn "$root/kernels" "$tree/fastnabla/kernels"
for entry in "$root"/*; do
  case ${entry##*/} in fastnabla | kernels | build) ;; *) ln -s "$entry" "$tree/" ;; esac
done
# The sources of the extension without pyproject.toml, which setuptools before 77 cannot read.
source=$root/build/source
rm -rf "$source"
mkdir -p "$source"
ln -s "$root"/{setup.py,csrc} "$source/"
cd "$tree"
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m bench.gpu "$@"
