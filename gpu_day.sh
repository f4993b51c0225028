#!/bin/bash
# All that is to be run on the day a GPU is at hand, in order of value, in at most 9 minutes. (Branch only.)
#
#   here, in the repository whose tree travels (its checkout must be this branch):
#     echo /.whl/ >> .git/info/exclude
#     python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl \
#       array-api-compat array-api-strict diffusers importlib-metadata zipp
#   there: run(command="bash gpu_day.sh", carry=[".whl"], timeout_s=590)
#
# By itself it installs what is in $WHEELS (default .whl) beside what is there, and writes to $OUT (default
# gpu_out): run.log (everything), kernels.json, mnist.json, cifar128.json, tests.log.
OUT=${OUT:-gpu_out}
WHEELS=${WHEELS:-.whl}
PY=${PY:-python3}
mkdir -p "$OUT"
exec > >(tee "$OUT/run.log") 2>&1
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
BEGAN=$SECONDS
say() { echo; echo "=== $((SECONDS - BEGAN)) s: $*"; }
# part SECONDS COMMAND...: never longer than that, nor than what is left of 9 minutes
part() {
  local most=$1 left=$((${ALL:-535} - (SECONDS - BEGAN))); shift
  [ "$left" -lt 5 ] && { echo "no time left for: $*"; return; }
  [ "$most" -gt "$left" ] && most=$left
  timeout -k 5 -s INT "$most" "$@"
  echo "--- rc $? after $((SECONDS - BEGAN)) s"
}

if ls "$WHEELS"/*.whl > /dev/null 2>&1; then
  $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$WHEELS"/*.whl
fi
export PYTHONPATH=$PWD:/tmp/site:$PYTHONPATH
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2> /dev/null
$PY - <<'PYTHON'
import cupy, numpy, torch, array_api_compat, diffusers
print("cupy", cupy.__version__, "numpy", numpy.__version__, "torch", torch.__version__, "diffusers", diffusers.__version__)
import tinydiff as td
td.get_backend("cupy")
print("accelerators", cupy._core.get_reduction_accelerators(), cupy._core.get_routine_accelerators())
PYTHON

say "can a step be recorded at all"
part 40 $PY -m pytest -p no:cacheprovider -m gpu -q -x tests/test_graph.py -k "mlp and training_is and 1.0"

say "tests, with the definitions (and the twin in its own)"
first='graph kernels portability resident gpu'
rest=$(ls tests/test_*.py | grep -v -E "oracle|test_(${first// /|})\.py")
part 150 $PY -m pytest -p no:cacheprovider -m gpu -q --durations=8 --maxfail=12 \
  $(printf 'tests/test_%s.py ' $first) $rest > "$OUT/tests.log" 2>&1
grep -v "^SKIP" "$OUT/tests.log" | tail -60

say "kernels against their definitions"
part 60 $PY gpu_check.py "$OUT/kernels.json"

say "mnist, 50 DDIM steps, toy (float32)"
part 130 $PY demos/benchmark.py --backend cupy --kernels cupy --recorded --no-compile --no-memory --rounds 5 \
  --configs mnist sampling toy --json "$OUT/mnist.json"

say "cifar, batch 128 (TF32 on both sides)"
part 110 $PY demos/benchmark.py --backend cupy --kernels cupy --recorded --no-compile --no-memory --rounds 3 \
  --configs cifar128 --tf32 --json "$OUT/cifar128.json"

say "the portability tests with the twin"
part 60 env TINYDIFF_CUPY_KERNELS=cupy $PY -m pytest -p no:cacheprovider -m gpu -q --maxfail=8 tests/test_portability.py tests/test_resident.py
say done
sleep 1 # for tee
