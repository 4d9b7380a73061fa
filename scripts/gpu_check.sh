#!/usr/bin/env bash
# Builds for the GPU at hand and checks there: tests, compute-sanitizer, benchmarks. Needs python3
# with a torch that has CUDA, nvcc and an NVIDIA GPU; works without a network as far as the packages
# are there (missing ones may lie as wheels in the folder $GPU_WHEELS). Writes its results to $OUT,
# or build/gpu-check; exits non-zero if anything failed or there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu-check}
export VENV=${VENV:-.venv}

if ! nvidia-smi -L >/dev/null 2>&1; then
  echo "gpu-check: no NVIDIA GPU on this machine (nvidia-smi finds none); nothing was checked" >&2
  exit 1
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu-check: the torch of $python does not see the GPU: set PYTHON to one that does" >&2
  exit 1
fi
mkdir -p "$out"
: >"$out/summary.txt"
failed=0

# step NAME COMMAND...: runs it, keeps its output in NAME.log, notes the outcome in summary.txt.
step() {
  local name=$1 start=$SECONDS status=0
  shift
  echo "==> $name"
  "$@" >"$out/$name.log" 2>&1 || status=$?
  [ $status -eq 0 ] || failed=1
  tail -n "$([ $status -eq 0 ] && echo 3 || echo 60)" "$out/$name.log"
  echo "$name: exit $status, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
  return $status
}

nvidia-smi >"$out/nvidia-smi.txt"
make --no-print-directory "PYTHON=$python" "VENV=$VENV" "$VENV/stamps/environment"
py=$VENV/bin/python
if [ -n "${GPU_WHEELS:-}" ]; then
  "$py" -m pip install -q --no-index --no-deps "$GPU_WHEELS"/*.whl
fi
export ORTHOREG_CUDA=ON CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-native}
step build "$py" -m pip install -v --no-index --no-deps --no-build-isolation -e . || exit 1
step info "$py" -c 'import json, orthoreg_ext as ox; print(json.dumps(ox.build_info(), indent=1))'
if ! "$py" -c 'import sys, orthoreg_ext as ox; sys.exit(not ox.build_info()["cuda"]["usable"])'; then
  echo "gpu-check: the CUDA kernels cannot run here, see $out/info.log" >&2
  exit 1
fi

ignored=(--ignore=tests/emu) # the emulator stands in for a GPU
if ! "$py" -c 'import torch_pruning' 2>/dev/null; then
  echo "gpu-check: torch_pruning is not installed, so tests/pruning and tests/experiment are left out" |
    tee -a "$out/summary.txt"
  ignored+=(--ignore=tests/pruning --ignore=tests/experiment)
fi
step exercise "$py" scripts/gpu_exercise.py || true
step pytest "$py" -m pytest "${ignored[@]}" -p no:cacheprovider -p no:benchmark \
  --junitxml="$out/pytest.xml" || true
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    step "sanitizer-$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 1 "$py" scripts/gpu_exercise.py || true
  done
else
  echo "gpu-check: compute-sanitizer is not installed; left out" | tee -a "$out/summary.txt"
fi
if [ -d benchmarks ]; then
  step benchmarks "$py" -m pytest benchmarks -p no:cacheprovider \
    --benchmark-json="$out/benchmarks.json" || true
fi
echo "==> gpu-check: results in $out"
cat "$out/summary.txt"
exit $failed
