#!/usr/bin/env bash
# Checks and measures this repository on the machine at hand: one command, no installation, no network.
#
#   bench/gpu_suite.sh [--toy]
#
# Machine facts and its measured peaks, the tests, then the benchmarks: kernels, Table 8, Table 1, the waterfall of a
# step, memory, multi-crop and, where DALI is installed, the loader. Results go to $OUT (bench/out): suite.log with everything that was printed, a JSON file per benchmark.
# A part that fails or runs out of its time does not stop the others; a short table ends the output. The exit code is
# that of the first part that failed.
#
# FASTDINO_SUITE_SECONDS  time for all of it (540); the parts' shares scale with it
# FASTDINO_OFFICIAL       a checkout of facebookresearch/dino, the rival of Table 8, Table 1 and the waterfall
# FASTDINO_CIFAR10        CIFAR-10 as image files, train/ and test/ with a folder per class, for the speedrun
# FASTDINO_COMMIT         of a copy without its git history, for the results
# PYTHON                  an interpreter with torch (python3)
#
# --toy runs the same on the CPU with tiny problems, in about a minute: it checks the suite, the times mean nothing.

set -u
cd "$(dirname "$0")/.." || exit 1
TOY=0
case "${1-}" in
    "") ;;
    --toy) TOY=1 ;;
    *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out}
TOTAL=${FASTDINO_SUITE_SECONDS:-540}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/suite.log
: >"$LOG"
STARTED=$SECONDS
FAILED=0
SUMMARY=""
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 FASTDINO_RESULTS=$OUT
[ "$TOY" = 1 ] && export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1

say() { printf '%s\n' "$*" | tee -a "$LOG"; }

# part NAME SECONDS COMMAND...: runs it within its share of the time and of what is left, and notes how it went.
part() {
    local name=$1 limit=$(($2 * TOTAL / 540)) left=$((TOTAL - SECONDS + STARTED)) began=$SECONDS code note
    shift 2
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 3 ]; then
        SUMMARY+=$(printf '%-18s not run: no time left' "$name")$'\n'
        return
    fi
    say $'\n'"== $name: $*"
    # An interrupt, at which pytest still tells what failed.
    timeout -s INT -k 5 "$limit" "$@" 2>&1 | tee -a "$LOG"
    code=${PIPESTATUS[0]}
    note=ok
    [ "$code" -ne 0 ] && note="failed with exit code $code"
    [ "$code" -eq 124 ] || [ "$code" -eq 137 ] && note="stopped at its limit of $limit s"
    [ "$code" -ne 0 ] && [ "$FAILED" -eq 0 ] && FAILED=$code
    SUMMARY+=$(printf '%-18s %4d s  %s' "$name" $((SECONDS - began)) "$note")$'\n'
}

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

say "fastdino suite: $("$PYTHON" --version 2>&1), $TOTAL s, $(date -u +%Y-%m-%dT%H:%MZ)"
command -v nvidia-smi >/dev/null && nvidia-smi 2>&1 | tee -a "$LOG"
for package in triton torchvision xformers nvidia.dali tyro safetensors pytest; do
    has "${package%%.*}" && has "$package" 2>/dev/null || say "$package is not installed: what needs it is left out"
done
OFFICIAL=()
if [ -n "${FASTDINO_OFFICIAL-}" ]; then
    OFFICIAL=(--official "$FASTDINO_OFFICIAL")
else
    say "FASTDINO_OFFICIAL is not set: the official code is not measured"
fi
MANY=()
has xdist && MANY=(-n "$((TOY ? 1 : 8))")

if [ "$TOY" = 1 ]; then
    T=(--toy --save --seconds 0.2)
    part machine 60 "$PYTHON" -m bench.machine --toy
    has pytest && part tests 120 "$PYTHON" -m pytest -q tests/models/test_head.py
    part kernels 100 "$PYTHON" -m bench.kernels --quick --op dino_loss
    part table8 120 "$PYTHON" -m bench.table8 "${T[@]}" --rows 2 "${OFFICIAL[@]}"
    part table1 60 "$PYTHON" -m bench.table1 "${T[@]}" --networks vit_small/16 resnet50 "${OFFICIAL[@]}"
    part waterfall 180 "$PYTHON" -m bench.step "${T[@]}" --local 2 "${OFFICIAL[@]}"
else
    [ -f kernels/fastdino_kernels/libfastdino_cpu.so ] || part build 25 "$PYTHON" setup.py -q build_csrc
    part machine 15 "$PYTHON" -m bench.machine
    if has pytest; then
        T=(-m pytest -q --tb=short -p no:cacheprovider "${MANY[@]}")
        part "tests engine" 50 "$PYTHON" "${T[@]}" tests/models tests/engine --ignore tests/engine/test_trainer.py
        part "tests kernels" 75 "$PYTHON" "${T[@]}" tests/kernels --ignore tests/kernels/test_ahead.py
    fi
    for op in dino_loss prototype_loss AdamWEMA; do
        part "kernels $op" 30 "$PYTHON" -m bench.kernels --op "$op" --seconds 0.3 --save
    done
    part table8 110 "$PYTHON" -m bench.table8 --save --seconds 8 --rows 10 0 6 2 "${OFFICIAL[@]}"
    part table1 35 "$PYTHON" -m bench.table1 --save --seconds 1 "${OFFICIAL[@]}"
    part waterfall 60 "$PYTHON" -m bench.step --save --seconds 15 --local 10 "${OFFICIAL[@]}"
    part memory 30 "$PYTHON" -m bench.memory --save
    part multicrop 20 "$PYTHON" -m bench.multicrop --save
    has nvidia && has nvidia.dali && part loader 60 "$PYTHON" -m bench.loader --save --locals 10 --workers 8 --rounds 2 --batch 64
    [ -n "${FASTDINO_CIFAR10-}" ] && has nvidia && part speedrun 120 "$PYTHON" -m bench.speedrun --save --images "$FASTDINO_CIFAR10"
fi
rm -f "$OUT"/*/*.csv "$OUT"/*/*.png # made from the JSON files, which suffice

say $'\n'"$("$PYTHON" -m bench.results_table --short "$OUT")"
say $'\n'"$SUMMARY"
say "$((SECONDS - STARTED)) s; results in $OUT"
exit "$FAILED"
