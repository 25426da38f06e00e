#!/usr/bin/env bash
# Builds the kernels, runs the GPU tests and writes the speed report into DIR, in at most nine minutes.
#   [PYTHON=python3] [LUMINA_COMMIT=hash] benchmarks/gpu_report.sh DIR
# Needs a GPU, torch, triton, pytest, pytest-benchmark and matplotlib, but no network. A step that fails
# does not stop the later ones; the exit code is 1 if the build, a test or a row of the report failed.
set -euo pipefail
[ $# = 1 ] || { echo "usage: benchmarks/gpu_report.sh DIR" >&2; exit 2; }
mkdir -p "$1/logs"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
total=540 # seconds, of all steps
failed=()

step() { echo "== $1 (${SECONDS} s)"; }

# The architecture of this GPU, in the form that setup.py takes.
arch=$("$python" - <<'PYTHON'
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_report.sh: {error}")
if not torch.cuda.is_available():
    sys.exit("gpu_report.sh: torch finds no CUDA GPU here")
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}")
PYTHON
)

step "build for sm_$arch"
TORCH_CUDA_ARCH_LIST=$arch timeout 180 "$python" setup.py -q build_ext --inplace \
    >"$out/logs/build.txt" 2>&1 || failed+=("the build")

# The accuracy tests of every op's GPU kernels in float32 (dtype0, dtype3) and bfloat16 (dtype2, dtype5)
# but not float16. Each file runs in a process of its own, so that compilers and launches use all cores.
step "tests"
chosen='accura and (triton or cuda) and not dtype1 and not dtype4 and (not float16 or bfloat16)'
tests=()
for path in lumina_kernels/ops/[a-z]*.py; do
    op=$(basename "$path" .py)
    file=$(find tests -name "test_${op}_kernels.py")
    file=${file:-$(find tests -name "test_$op.py")}
    if [ -n "$file" ]; then tests+=("$file"); else failed+=("$op has no tests"); fi
done
run_tests() { # file
    local name
    name=$(basename "$1" .py)
    timeout 150 "$python" -m pytest "$1" -k "$chosen" -p no:cacheprovider \
        --junitxml="$out/logs/$name.xml" >"$out/logs/$name.txt" 2>&1
}
jobs=()
for file in "${tests[@]}"; do
    run_tests "$file" &
    jobs+=($!)
done
for i in "${!jobs[@]}"; do
    wait "${jobs[$i]}" || failed+=("${tests[$i]} (exit code $?)") # 124: out of time
done

if command -v compute-sanitizer >/dev/null; then
    step "compute-sanitizer"
    mapfile -t files < <(find tests -name test_swiglu.py -o -name test_norm_modulate.py)
    timeout 40 compute-sanitizer --error-exitcode 9 "$python" -m pytest "${files[@]}" \
        -k "$chosen and cuda" -x -p no:cacheprovider \
        >"$out/logs/sanitizer.txt" 2>&1 || [ $? = 124 ] || failed+=("compute-sanitizer")
fi

# Compilers are most of a report's time: each file's work first, side by side, for their caches. Not
# the searches of max-autotune, whose measurements would disturb each other.
step "compile"
for file in benchmarks/ops/bench_*.py benchmarks/models/bench_{block,forward}.py; do
    timeout 90 "$python" -m pytest "$file" --benchmark-only -q -p no:cacheprovider --device cuda \
        --seconds 0.01 --batches 1 -k "not max-autotune" >/dev/null 2>&1 &
done
wait

# 40 seconds are left to collect the tests, finish the last case and draw the plots.
step "report"
"$python" -m benchmarks.report --device cuda --budget $((total - SECONDS - 40)) --out "$out" ||
    failed+=("a row of the report")

step "done"
if [ ${#failed[@]} != 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" | tee "$out/logs/failed.txt"
    echo "see $out/logs"
    exit 1
fi
