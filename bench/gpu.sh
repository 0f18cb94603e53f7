#!/usr/bin/env bash
# make gpu: all that needs an NVIDIA GPU, in under ten minutes, installing nothing: build, tests, training, benches, sanitizer.
# Needs nvcc and a python3 (or PYTHON=...) with a CUDA build of torch >= 2.11, triton, numpy, setuptools, pybind11, pytest,
# pytest-benchmark and pytest-timeout. A step that fails or runs out of time is noted, and the next one starts.
# Exit status: 0 all steps passed, 1 a step failed, 2 nothing could be run. Results, files in $OUT (default bench/results):
#   summary.md (machine, steps, key figures)  bench.md (all tables)  bench_*.json (pytest-benchmark)  logs.txt (output of the steps)
#   train_step.png (speed-up against batch size, where there is matplotlib)
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}

# Seconds a step may take; in all 570. TOTAL cuts the last steps should the others have used up theirs.
TOTAL=575
declare -A LIMIT=([build]=85 [doctor]=15 [tests]=130 [train]=20 [command]=20 [train_step]=125 [gan_loss]=25 [linear_lrelu]=30
                  [mlp_critic]=30 [other_ops]=40 [memcheck]=20 [racecheck]=15 [initcheck]=15)

unset GANKERN_BACKEND TRITON_INTERPRET PYTEST_ADDOPTS
export PYTHONPATH=. GANKERN_TEST_DEVICE=cuda GANKERN_REQUIRE=compiled,triton PYTHONUNBUFFERED=1

refuse() { echo "make gpu: $1; nothing was run." >&2; exit 2; }
command -v "$PYTHON" >/dev/null || refuse "$PYTHON was not found (set PYTHON=...)"
why=$("$PYTHON" - 2>&1 <<'PY' | tail -n 1
import importlib.util
needed = "torch triton numpy setuptools pybind11 pytest pytest_benchmark pytest_timeout".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if "torch" not in missing:
    import torch
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is not a CUDA build"
        print(f"no NVIDIA GPU that PyTorch can use was found (torch {torch.__version__} {built})")
        missing = []
    elif tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        missing.append(f"torch >= 2.11 (it has {torch.__version__})")
if missing:
    print(f"this python3 lacks {', '.join(missing)}")
PY
)
[ -z "$why" ] || refuse "$why"
command -v nvcc >/dev/null || export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

mkdir -p "$OUT" || refuse "\$OUT must be a folder that can be written, got $OUT"
rm -f "$OUT"/{summary.md,bench.md,logs.txt,train_step.png,bench_linear_lrelu.json,bench_gan_loss.json,bench_train_step.json,bench_mlp_critic.json,bench_other_ops.json}
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT

{
  echo "- date: $(date -u '+%Y-%m-%d %H:%M UTC')"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | sed 's/^/- GPU, driver, memory: /'
  nvcc --version 2>/dev/null | sed -n 's/.*\(release.*\)/- nvcc: \1/p'
  grep -m1 'model name' /proc/cpuinfo | sed 's/.*: /- CPU: /; s/$/, '"$(nproc)"' cores/'
  "$PYTHON" - <<'PY'
import importlib.metadata, platform, torch
print(f"- python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda}), sm_{''.join(map(str, torch.cuda.get_device_capability()))}")
for name in ("triton", "numpy", "pytest", "pytest-benchmark", "hypothesis", "tyro"):
    try:
        print(f"- {name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        print(f"- {name}: not installed")
PY
} >"$work/machine.md" 2>&1
cat "$work/machine.md"

rows=() failures=0
note() { rows+=("$1|$2|$3"); printf '%-14s %-28s %4s s\n' "$1" "$2" "$3"; }

# step NAME COMMAND...: run it within LIMIT[NAME], log it, go on.
step() {
  local name=$1 limit=${LIMIT[$1]} log="$work/$1.log" started=$SECONDS status=0 result
  shift
  if [ $((SECONDS + 10)) -gt $TOTAL ]; then
    failures=$((failures + 1)) && note "$name" "NOT RUN (no time left)" 0
    return
  fi
  [ $((SECONDS + limit)) -le $TOTAL ] || limit=$((TOTAL - SECONDS))
  timeout -k 5 "$limit" "$@" >"$log" 2>&1 || status=$?
  case $status in
    0) result=passed ;;
    124 | 137) result="FAILED (over $limit s)" ;;
    *) result="FAILED (status $status)" ;;
  esac
  if [ $status -ne 0 ] && grep -q 'Device not supported' "$log"; then
    result="skipped (device refuses it)"
  elif [ $status -ne 0 ]; then
    failures=$((failures + 1))
  fi
  { echo "===== $name: $result, $((SECONDS - started)) s: $*"; tail -c 2000000 "$log"; echo; } >>"$OUT/logs.txt"
  note "$name" "$result" $((SECONDS - started))
}

# bench NAME FILE...: the last group begins 20 s before the limit, one that compiles a training step 40 s.
bench() {
  local name=$1 seconds=$((LIMIT[$1] - 20))
  [ "$name" != train_step ] || seconds=$((seconds - 20))
  shift
  step "$name" "$PYTHON" -m pytest "$@" -q --benchmark-quiet --bench-device cuda --bench-seconds $seconds \
    --benchmark-json "$OUT/bench_$name.json"
}

# The tests that ask on which device they run, wherever they are.
tests=$(grep -lE 'tests import support|tests\.support|TEST_DEVICE' tests/test_*.py)
parallel=$("$PYTHON" -c 'import importlib.util; print("-n 8" if importlib.util.find_spec("xdist") else "")')

GANKERN_BUILD=require step build bash -c '"$0" setup.py build_ext --inplace && test -f gankern/_cuda.so' "$PYTHON"
step doctor "$PYTHON" -m gankern doctor
# shellcheck disable=SC2086
step tests "$PYTHON" -m pytest tests/ops $tests -q $parallel --timeout 100 -p no:benchmark
step train "$PYTHON" -m bench.gpu_smoke train
if "$PYTHON" -c 'import tyro, rich, PIL, safetensors, tensorboard, matplotlib' 2>/dev/null; then
  step command "$PYTHON" -m gankern train gan --steps 2000 --device cuda --outdir "$work/runs"
else
  note command "skipped (no tyro, rich ...)" 0
fi
bench train_step bench/bench_train_step.py
bench gan_loss bench/bench_gan_loss.py
bench linear_lrelu bench/bench_linear_lrelu.py
bench mlp_critic bench/bench_mlp_critic.py
mapfile -t others < <(ls bench/bench_*.py | grep -vE 'train_step|gan_loss|linear_lrelu|mlp_critic')
bench other_ops "${others[@]}"
if command -v compute-sanitizer >/dev/null; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  step memcheck compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 "$PYTHON" -m bench.gpu_smoke kernels ops
  step racecheck compute-sanitizer --tool racecheck --racecheck-report analysis --error-exitcode 1 "$PYTHON" -m bench.gpu_smoke kernels
  step initcheck compute-sanitizer --tool initcheck --error-exitcode 1 "$PYTHON" -m bench.gpu_smoke kernels
else
  note memcheck "skipped (not installed)" 0
  note racecheck "skipped (not installed)" 0
  note initcheck "skipped (not installed)" 0
fi

shopt -s nullglob
jsons=("$OUT"/bench_*.json)
[ ${#jsons[@]} -eq 0 ] || "$PYTHON" -m bench.report "${jsons[@]}" --markdown "$OUT/bench.md" >"$work/report.log" 2>&1 || cat "$work/report.log"

"$PYTHON" -m bench.report "$OUT/bench_train_step.json" --plot "$OUT/train_step.png" >/dev/null 2>&1 # where there is matplotlib

# Last, and short: the steps, then the key figures.
figures() {
  grep -h 'images/s' "$work/train.log" 2>/dev/null
  for name in tests train_step gan_loss linear_lrelu mlp_critic other_ops; do
    printf '\n%s: %s\n' "$name" "$(tail -n 1 "$work/$name.log" 2>/dev/null)"
    [ ! -f "$OUT/bench_$name.json" ] || "$PYTHON" -m bench.report "$OUT/bench_$name.json" --limit 8
  done
}
figures >"$work/figures.txt" 2>&1
{
  printf '# make gpu\n\n'
  cat "$work/machine.md"
  printf '\n| step | result | seconds |\n| --- | --- | --- |\n'
  for line in "${rows[@]}"; do echo "| ${line//|/ | } |"; done
  printf '\n```\n'
  cat "$work/figures.txt"
  printf '```\n'
} >"$OUT/summary.md"

printf '\n== %s s in all\n' "$SECONDS"
for line in "${rows[@]}"; do IFS='|' read -r name result seconds <<<"$line" && printf '%-14s %-28s %4s s\n' "$name" "$result" "$seconds"; done
cat "$work/figures.txt"
[ $failures -eq 0 ]
