#!/usr/bin/env bash
# Builds for the GPU at hand and checks there, in under nine minutes; needs no network.
#
#   scripts/gpu_check.sh                           all stages
#   STAGES="build pytest" scripts/gpu_check.sh     some of them; "build" is skipped where it is done
#   EMULATED=1 scripts/gpu_check.sh                without a GPU: every stage once, on the emulator
#
#   build       a virtual environment that sees this Python's packages, the package for this GPU
#   info        nvidia-smi, orthoreg info
#   exercise    every operator on ragged and large layers against the reference
#   properties  same bits always, no call waits for the GPU, CUDA graphs
#   probes      what the hardware gives: tensor cores, L2, memory, launches
#   bench       the package beside every baseline of benchmarks/baselines.py
#   pytest      the whole test suite on the GPU
#   emu         the PTX wrappers and instructions of the emulator, on the GPU
#   sanitizers  compute-sanitizer: memcheck, racecheck, initcheck, synccheck, on small layers
#
# They run in this order: right numbers first, then the benchmark, then what takes longest.
# PYTHON is a Python with a torch that has CUDA. Packages that it lacks may lie as wheels in the
# folder $GPU_WHEELS. Results go to $OUT, or build/gpu-check (build/emulated-check where EMULATED);
# exits non-zero if a stage failed or was left out, or if there is no GPU. TOTAL_SECONDS bounds the
# whole. Each stage has a share of it, and what those before it did not use; one for which no time is
# left says "LEFT OUT: no time", and a second call with STAGES finishes the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
emulated=${EMULATED:-}
[ "$emulated" = 0 ] && emulated=
out=${OUT:-build/$([ -n "$emulated" ] && echo emulated || echo gpu)-check}
order="build info exercise properties probes bench pytest emu sanitizers"
stages=${STAGES:-$order}
# Seconds: 500 of the 520, as something runs between the stages too.
declare -A share=([build]=135 [info]=15 [exercise]=40 [properties]=45 [probes]=25 [bench]=90
  [pytest]=75 [emu]=25 [sanitizers]=50)
# Of the emulator's, nobody shall take a result for one of a GPU.
suffix=${emulated:+-emulated}
flag=${emulated:+--emulated}
venv=${GPU_VENV:-build/gpu-venv}
py=$venv/bin/python
[ -n "$emulated" ] && py=$(command -v "$python")
jobs=${MAX_JOBS:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$([ -n "$emulated" ] && echo 1 || echo 4)}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

if [ -z "$emulated" ]; then
  if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "gpu-check: no NVIDIA GPU on this machine (nvidia-smi finds none); nothing was checked" >&2
    exit 1
  fi
  if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu-check: the torch of $python does not see the GPU: set PYTHON to one that does" >&2
    exit 1
  fi
fi
for stage in $stages; do
  if [ -z "${share[$stage]:-}" ]; then
    echo "gpu-check: there is no stage '$stage'; they are listed in scripts/gpu_check.sh" >&2
    exit 1
  fi
done
mkdir -p "$out"
summary=$out/summary$suffix.txt
: >>"$summary"
failed=0

total=${TOTAL_SECONDS:-$([ -n "$emulated" ] && echo 3600 || echo 520)}
time_left() { echo $((total - SECONDS)); }
note() { echo "$*" | tee -a "$summary"; }
wanted() { case " $stages " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

left_out=()

# limit_of STAGE: the seconds it may take: its share, or more where the shares of the wanted stages
# after it leave more; never more than there is.
limit_of() {
  local later=0 after='' stage
  for stage in $order; do
    if [ -n "$after" ] && wanted "$stage"; then later=$((later + share[$stage])); fi
    [ "$stage" = "$1" ] && after=yes
  done
  local left limit
  left=$(time_left)
  limit=$((left - later))
  [ "$limit" -ge "${share[$1]}" ] || limit=${share[$1]}
  echo $((limit < left ? limit : left))
}

# has_time STAGE: whether it is worth starting; notes it where not.
has_time() {
  [ "$(limit_of "$1")" -lt 10 ] || return 0
  failed=1
  left_out+=("$1")
  note "$1: LEFT OUT: no time, $(limit_of "$1") s of the $total s of TOTAL_SECONDS are left"
  return 1
}

# step STAGE COMMAND...: runs it for as long as it may take, keeps its output in STAGE.log, notes the
# outcome; what comes after runs whatever it is.
step() {
  local name=$1 limit start=$SECONDS status=0 log
  shift
  log=$out/$name$suffix.log
  has_time "$name" || return 1
  limit=$(limit_of "$name")
  echo "==> $name, at most $limit s"
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 || status=$?
  [ $status -eq 0 ] || failed=1
  tail -n "$([ $status -eq 0 ] && echo 4 || echo 60)" "$log"
  local outcome="exit $status"
  [ $status -eq 0 ] && outcome=passed
  if [ $status -eq 124 ] || [ $status -eq 137 ]; then outcome="TIMED OUT after $limit s"; fi
  note "$name: $outcome, $((SECONDS - start)) s"
  return $status
}

make_environment() {
  PIP_NO_INDEX=1 PIP_FIND_LINKS=${GPU_WHEELS:-} "$python" scripts/environment.py \
    --folder "$venv" --torch none || return 1
  if [ -n "${GPU_WHEELS:-}" ]; then
    "$py" -m pip install -q --no-index --no-deps "$GPU_WHEELS"/*.whl || return 1
  fi
}

# In an environment of its own, which is made where it is missing.
build() {
  [ -x "$py" ] || make_environment || return 1
  MAX_JOBS=$jobs "$py" -m pip install -v --no-index --no-deps --no-build-isolation -e .
}

sanitizers() {
  local sanitizer running=() tool pid status bad=0 text limit filter
  limit=$(limit_of sanitizers)
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  if [ ! -x "$sanitizer" ]; then
    note "sanitizers: left out, compute-sanitizer is not installed"
    return 0
  fi
  # Four processes at once, on our kernels alone; but initcheck must see what others write.
  for tool in memcheck racecheck initcheck synccheck; do
    filter=(--kernel-name kns=orthoreg)
    [ $tool = initcheck ] && filter=()
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 "$limit" "$sanitizer" \
      --tool "$tool" "${filter[@]}" --error-exitcode 1 \
      "$py" scripts/gpu_exercise.py --quick >"$out/sanitizer-$tool.log" 2>&1 &
    running+=("$tool:$!")
  done
  for pid in "${running[@]}"; do
    tool=${pid%%:*} status=0
    wait "${pid##*:}" || status=$?
    text=$(grep 'SUMMARY' "$out/sanitizer-$tool.log" | tail -n 1 || true)
    if grep -q 'Device not supported' "$out/sanitizer-$tool.log"; then
      note "sanitizer-$tool: left out, compute-sanitizer does not support this machine"
    elif [ $status -eq 0 ] && [ -n "$text" ]; then
      note "sanitizer-$tool: passed (${text##*= })"
    else
      bad=1
      tail -n 40 "$out/sanitizer-$tool.log"
      note "sanitizer-$tool: exit $status ${text:-(124 is a timeout; no summary)}"
    fi
  done
  return $bad
}

note "---- $(date -u +%FT%TZ) stages: $stages${emulated:+ (EMULATED: no GPU was used)}"
if wanted build; then
  if [ -n "$emulated" ]; then
    step build "$py" -m tests.emu.build || exit 1
  else
    export ORTHOREG_CUDA=ON CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-native}
    export python venv py jobs
    export -f make_environment build
    step build bash -c build || exit 1
  fi
fi
if [ ! -x "$py" ]; then
  echo "gpu-check: $venv is not there yet: run the stage build first" >&2
  exit 1
fi
if wanted info; then
  [ -n "$emulated" ] || nvidia-smi >"$out/nvidia-smi.txt" 2>&1 || true
  step info "$py" -c 'import json, orthoreg_ext as ox; print(json.dumps(ox.build_info(), indent=1))' ||
    true
fi
if [ -z "$emulated" ] &&
  ! "$py" -c 'import sys, orthoreg_ext as ox; sys.exit(not ox.build_info()["cuda"]["usable"])'; then
  note "gpu-check: the CUDA kernels cannot run here, see $out/info.log; nothing else was checked"
  exit 1
fi
if wanted exercise; then
  step exercise "$py" scripts/gpu_exercise.py $flag ${emulated:+--quick --large} || true
fi
if wanted properties; then
  step properties "$py" scripts/gpu_properties.py $flag || true
fi
if wanted probes; then
  step probes "$py" scripts/gpu_probes.py $flag --out "$out/probes$suffix.json" || true
fi
if wanted bench; then
  # A case that is under way when its time is over still finishes.
  seconds=$(limit_of bench)
  seconds=$((seconds < 230 ? seconds * 2 / 3 : 150))
  [ -n "$emulated" ] && seconds=10
  device=$([ -n "$emulated" ] && echo emulated || echo cuda)
  step bench "$py" -m benchmarks.compare --device "$device" --budget "$seconds" --out "$out" || true
fi
if wanted pytest; then
  selected=(tests --ignore=tests/emu -k "cuda or gpu")
  [ -n "$emulated" ] && selected=(tests/test_schedules.py)
  if ! "$py" -c 'import torch_pruning' 2>/dev/null; then
    note "pytest: torch_pruning is not installed, so tests/pruning and tests/experiment are left out"
    selected+=(--ignore=tests/pruning --ignore=tests/experiment)
  fi
  # Each worker holds its own CUDA context and memory pool.
  if "$py" -c 'import xdist' 2>/dev/null; then
    selected+=(-n "$((jobs < 8 ? jobs : 8))")
  fi
  step pytest "$py" -m pytest -q "${selected[@]}" -p no:cacheprovider -p no:benchmark \
    --junitxml="$out/pytest$suffix.xml" || true
fi
if wanted emu; then
  marked=(-m gpu tests/emu/test_wrappers.py tests/emu)
  [ -n "$emulated" ] && marked=(tests/emu/test_wrappers.py)
  step emu "$py" -m pytest -q "${marked[@]}" -p no:cacheprovider -p no:benchmark || true
fi
if wanted sanitizers; then
  if [ -n "$emulated" ]; then
    step sanitizers "$py" scripts/gpu_exercise.py --quick --emulated || true
  elif has_time sanitizers; then
    echo "==> sanitizers, at most $(limit_of sanitizers) s"
    sanitizers || failed=1
  fi
fi
archive=$(mktemp) # elsewhere: tar fails where the folder changes that it reads
tar -czf "$archive" --exclude='*.tar.gz' -C "$out" .
mv "$archive" "$out/all$suffix.tar.gz"
echo "==> gpu-check: results in $out, together in all$suffix.tar.gz"
cat "$summary"
if [ ${#left_out[@]} -gt 0 ]; then
  echo "==> gpu-check: for the rest: STAGES=\"${left_out[*]}\" scripts/gpu_check.sh"
fi
exit $failed
