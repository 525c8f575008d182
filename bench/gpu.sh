#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU, in at most nine minutes, without installing anything:
#
#     bench/gpu.sh
#
# runs the tests marked gpu, the kernels' benchmarks and, where diffusers is installed, that of the training step;
# leaves bench/results/kernels_<gpu>_<date>.json and .md, copies them to $OUT if that is a folder, and prints the table
# last. PYTHON: the interpreter, python3 if not given. Fails, after all that, if a test or benchmark failed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
[[ $python == */* ]] && python=$(realpath -s "$python")
into=("$root/bench/results")
[[ -d ${OUT:-} ]] && into+=("$(realpath "$OUT")")
deadline=$((SECONDS + 530))

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

missing=()
for package in torch triton pytest pytest_benchmark; do has "$package" || missing+=("${package/_/-}"); done
if ((${#missing[@]})); then
  echo "Not installed for $python, and needed: ${missing[*]}. Install them: $python -m pip install ${missing[*]}" >&2
  exit 1
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no CUDA device here; these tests and benchmarks need one." >&2
  exit 1
fi

# The package as an installation would lay it out: kernels/ is fastnabla.kernels. Everything runs in this folder, so that
# it is found first, whatever is installed.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/fastnabla"
ln -s "$root"/fastnabla/* "$root/kernels" "$tree/fastnabla/"
ln -s "$root"/{tests,bench,pyproject.toml} "$tree/"
cd "$tree"
unset TRITON_INTERPRET
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH}

# Runs pytest for at most $1 seconds, and no longer than until the deadline; an interrupt lets it write what it has.
limited_pytest() {
  local limit=$((deadline - SECONDS))
  ((limit > $1)) && limit=$1
  ((limit > 0)) || { echo "no time left for: pytest ${*:2}"; return 124; }
  timeout --signal=INT --kill-after=10 "$limit" "$python" -m pytest -q -p no:cacheprovider "${@:2}"
}

failed=0
mapfile -t marked < <(grep -liE 'gpu|kernel_cases' tests/test_*.py || true)
tests="none"
if ((${#marked[@]})); then
  for package in diffusers hypothesis; do has "$package" || echo "not installed: $package; test files that import it fail"; done
  code=0
  limited_pytest 150 -m gpu --continue-on-collection-errors "${marked[@]}" || code=$?
  case $code in
    0) tests="passed" ;;
    5) ;; # nothing was selected
    *) tests="failed" failed=1 ;;
  esac
fi
echo "GPU tests: $tests"

mkdir "$tree/raw"
bench() {
  limited_pytest "$1" "bench/bench_$2.py" --benchmark-only --benchmark-columns=median,iqr,rounds \
    --benchmark-json="$tree/raw/$2.json"
}
bench 300 kernels || failed=1
if has diffusers; then
  # Its trainer and its baseline are set up for the CPU.
  CUDA_VISIBLE_DEVICES="" bench 90 step || { failed=1; rm -f "$tree/raw/step.json"; }
else
  echo "not installed: diffusers; the training step is not timed"
fi

raw=()
for file in "$tree"/raw/*.json; do [[ -s $file ]] && raw+=("$file"); done
if ((!${#raw[@]})); then
  echo "No benchmark has finished; there is nothing to write." >&2
  exit 1
fi
"$python" -m bench.summary "${raw[@]}" --into "${into[@]}" --tests "$tests"
exit "$failed"
