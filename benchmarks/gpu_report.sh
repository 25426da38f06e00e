#!/usr/bin/env bash
# Proves and measures the kernels on a GPU, in three commands of at most nine minutes each:
#   benchmarks/gpu_report.sh build DIR     builds them; accuracy at a model's sizes; tests; memcheck
#   benchmarks/gpu_report.sh ops DIR       backends, peers and configurations of every op
#   benchmarks/gpu_report.sh networks DIR  torch.compile, whole and patched networks, pipelines
# Then `python -m benchmarks.choose DIR/rows.jsonl` writes lumina_kernels/measured.json.
# Variables: PYTHON, the interpreter (python3); LUMINA_COMMIT, for a copy without git; BUDGET, seconds
# (520); SMALL=1, tiny sizes that only try this script; CHOSEN, of pytest's -k for the tests.
# Needs a GPU, torch, triton and pytest, for networks pytest-benchmark and diffusers; no network.
#
# DIR gets at most eight files, all commands together, which are good whenever one is killed: rows are
# appended to them as they are measured, and logs are packed after every step. A step that fails does not stop
# the later ones; the exit code is 1 if one failed.
set -uo pipefail
usage() { echo "usage: benchmarks/gpu_report.sh build|ops|networks DIR" >&2; exit 2; }
[ $# = 2 ] || usage
case $1 in build | ops | networks) command=$1 ;; *) usage ;; esac
mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
budget=${BUDGET:-520}
small=()
seconds_each=0.5 # of a benchmark
files=(tests/ops/test_*.py)
attention=(tests/ops/test_gqa_attention*.py)
checked=(tests/ops/test_swiglu.py tests/ops/test_gqa_attention_kernels.py) # by compute-sanitizer
if [ -n "${SMALL:-}" ]; then
    small=(--small --seconds 0.001)
    seconds_each=0.001
    files=(tests/ops/test_swiglu.py)
    checked=("${files[@]}")
    attention=("${files[@]}")
fi
logs=$(mktemp -d)
failed=()

left() { echo $((budget - SECONDS > 1 ? budget - SECONDS : 1)); }
step() { echo "== $1 ($SECONDS s)"; }
pack() { # the logs so far, into one file
    tar -czf "$logs.tar.gz" -C "$logs" . && mv "$logs.tar.gz" "$out/$command-logs.tar.gz"
}
fail() {
    failed+=("$1")
    printf 'failed: %s\n' "$1" | tee -a "$out/failed.txt"
}
finish() {
    pack
    rm -rf "$logs"
}
trap 'exit 143' TERM INT
trap finish EXIT

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
) || exit 1

build() { # nothing to do where an earlier command did it on the same machine
    step "build for sm_$arch"
    TORCH_CUDA_ARCH_LIST=$arch timeout -k 5 "$(left)" "$python" setup.py -q build_ext --inplace \
        >"$logs/build.txt" 2>&1 || fail "the build"
    pack
}

# The tests of every op in float32 and bfloat16, each file in a process of its own; float16 shares
# the code of bfloat16.
chosen="(triton or cuda) and (not float16 or bfloat16)${CHOSEN:+ and ($CHOSEN)}"

run_tests() { # name, file...
    local name=$1
    shift
    timeout -k 5 "$(left)" "$python" -m pytest "$@" -k "$chosen" -p no:cacheprovider -v \
        --tb=short >"$logs/$name.txt" 2>&1
}

# One of the parallel jobs: its exit code and pytest's last line go to tests.txt when it ends.
job() { # name, file...
    run_tests "$@"
    local code=$?
    echo "$code $1: $(tail -n 1 "$logs/$1.txt")" >>"$out/tests.txt"
    return $code
}

sanitize() { # name, file...
    local name=$1
    shift
    timeout -k 5 "$(left)" compute-sanitizer --error-exitcode 9 "$python" -m pytest "$@" -x -v \
        -k "$chosen and cuda and accura" -p no:cacheprovider >"$logs/$name.txt" 2>&1
}

prove() {
    step "accuracy, tests and compute-sanitizer"
    local jobs=() names=() file
    timeout -k 5 "$(left)" "$python" -m benchmarks.gpu.accuracy "$out/accuracy.jsonl" \
        --budget "$(($(left) - 15))" "${small[@]:0:1}" >"$logs/accuracy.txt" 2>&1 &
    jobs+=($!) names+=(accuracy)
    if command -v compute-sanitizer >/dev/null; then
        sanitize sanitizer "${checked[@]}" &
        jobs+=($!) names+=(compute-sanitizer)
        if [ "$arch" = 9.0 ]; then
            LUMINA_KERNELS_HOPPER=1 sanitize sanitizer-hopper "${checked[@]: -1}" &
            jobs+=($!) names+=("compute-sanitizer, hopper")
        fi
    fi
    for file in "${files[@]}"; do
        job "$(basename "$file" .py)" "$file" &
        jobs+=($!) names+=("$(basename "$file" .py)")
    done
    if [ "$arch" = 9.0 ]; then # attention's forward by wgmma, which has to be asked for
        LUMINA_KERNELS_HOPPER=1 job hopper "${attention[@]}" &
        jobs+=($!) names+=(hopper)
    fi
    local i code
    for i in "${!jobs[@]}"; do
        wait "${jobs[$i]}"
        code=$?
        case $code in
        0 | 5) ;; # 5: no test of the file was chosen
        124) fail "${names[$i]}: out of time" ;;
        *) fail "${names[$i]} (exit code $code)" ;;
        esac
        pack
    done
}

sweep() {
    step "backends and configurations of the ops"
    local code=3
    while [ $code = 3 ] && [ "$(left)" -gt 15 ]; do # 3: the process cannot go on after an error
        timeout -k 5 "$(left)" "$python" -m benchmarks.gpu.sweep "$out/rows.jsonl" \
            --budget "$(($(left) - 15))" "${small[@]}" 2>&1 | tee -a "$logs/sweep.txt"
        code=${PIPESTATUS[0]}
        pack
    done
    [ "$code" = 0 ] || fail "the sweep (exit code $code)"
}

# Benchmarks of pytest, whose rows go to a file as they come.
measure() { # name, seconds at most, arguments...
    step "$1"
    local name=$1 seconds=$2
    shift 2
    [ "$seconds" -lt "$(left)" ] || seconds=$(left)
    timeout -k 5 "$seconds" "$python" -m pytest "$@" --benchmark-only -q -p no:cacheprovider \
        --device cuda --seconds "$seconds_each" --budget "$((seconds > 25 ? seconds - 25 : seconds))" \
        --rows "$out/networks.jsonl" >"$logs/$name.txt" 2>&1
    local code=$?
    case $code in
    0 | 5) ;; # 5: nothing was selected
    124) fail "$name: out of time" ;;
    *) fail "$name (exit code $code)" ;;
    esac
    pack
}

networks() {
    local models=benchmarks/models
    if [ -n "${SMALL:-}" ]; then
        measure forward 200 $models/bench_block.py -k quick
        measure patched 250 $models/bench_patched_block.py -k "bfloat16 and quick"
        measure compile 150 benchmarks/ops/bench_swiglu.py -k compact
        return
    fi
    measure forward 200 $models/bench_forward.py $models/bench_block.py -k "not max-autotune"
    measure patched 250 $models/bench_patched.py $models/bench_patched_block.py -k bfloat16
    measure compile 150 benchmarks/ops -k "quick and not max-autotune"
    [ "$(left)" -lt 60 ] || measure sample 120 $models/bench_sample.py
}

case $command in
build) build && prove ;;
ops) build && sweep ;;
networks) build && networks ;;
esac
step "done"
[ ${#failed[@]} = 0 ]
