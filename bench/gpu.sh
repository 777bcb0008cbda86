#!/usr/bin/env bash
# What a GPU can say about this project in half an hour, in order of worth.
#
#     bench/gpu.sh [FOLDER] [any option of train_gpt.py]
#
# Results go to FOLDER (default: logs/gpu), and what they add up to into FOLDER/summary.md. Each part has a limit in
# seconds, writes its output as it comes, and stops no other: a part that fails says so in the summary. It needs a GPU,
# of whatever size (a batch is cut finer where the GPU is small), and no shards. It sets itself up like tests/run.sh; with
# PYTHON, which then has PyTorch and tests/requirements.txt, it needs no network, but for GPT-2's vocabulary, which
# TIKTOKEN_CACHE_DIR may have.
# Environment: PYTHON, PRESET (record), STEPS (100), LIMIT (seconds that no part may take more than).
set -uo pipefail
CDPATH='' cd -- "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    . ./setup.sh
    add_tests
fi
python=$PYTHON preset=${PRESET:-record} steps=${STEPS:-100}
out=logs/gpu
case "${1:-}" in
    "" | -*) ;;
    *) out=$1; shift ;;
esac
mkdir -p "$out/data"
out=$(cd "$out" && pwd)
summary=$out/summary.md
{
    echo "# $preset on a GPU"
    echo
    nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || echo "no GPU found"
    echo
    echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo none), $(date -u '+%Y-%m-%d %H:%M') UTC"
    echo
    echo "| part | result | seconds |"
    echo "|---|---|---|"
} >"$summary"

# part NAME LIMIT COMMAND...: runs it with a limit in seconds; its output goes to NAME.txt.
part() {
    local name=$1 limit=$2 begin=$SECONDS status=0 result=ok
    shift 2
    if [ "${LIMIT:-$limit}" -lt "$limit" ]; then limit=$LIMIT; fi
    echo "$name: $*" >&2
    timeout --kill-after 10 "$limit" "$@" >"$out/$name.txt" 2>&1 || status=$?
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        result="cut off after $limit s"
    elif [ "$status" -ne 0 ]; then
        result="failed with status $status: $(tail -n 1 "$out/$name.txt" | tr '|' '/' | cut -c1-150)"
    fi
    echo "| [$name]($name.txt) | $result | $((SECONDS - begin)) |" >>"$summary"
    echo "    $result" >&2
}

# text_shards TOKENIZER: shards of the texts of this Python's own modules.
text_shards() {
    local modules
    modules=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    "$python" data/text.py "$modules" --out "$out/data" --tokenizer "$1" --skip-bad --max-doc-tokens 4096
}
tokenizer=gpt2
if [ "$preset" = tiny ]; then tokenizer=bytes; fi
export python out
export -f text_shards

part environment 60 bash -c 'nvidia-smi; "$python" -c "import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)"'
part kernels 240 "$python" -m pytest -q tests/gpu/test_kernels.py
part shards 150 bash -c "text_shards $tokenizer"
part slices 60 "$python" bench/plan.py --preset "$preset" --fit 1 "$@"
read -ra fit < <(grep -o '^--slices [0-9]*$' "$out/slices.txt")

run=(--preset "$preset" --train-files "$out/data/*_train_*.bin" --val-files "$out/data/*_val_*.bin" --epochs 1000)
run+=("${fit[@]}" "$@")
id=gpu_$(date -u +%Y%m%d_%H%M%S)
short=(--steps "$steps" --val-every 1000 --val-tokens 262144)
if [ "$preset" = tiny ]; then short+=(--val-seq-len 16384); fi

part training 420 "$python" train_gpt.py "${short[@]}" "${run[@]}" --run-id "$id"
part graphs 300 "$python" -m pytest -q tests/gpu/test_graphs.py tests/gpu/test_training.py -m "slow or not slow"
part step_time 300 "$python" bench/step_time.py "${run[@]}" --profile 10
part kernel_times 120 "$python" bench/kernels.py
part attention 150 "$python" bench/attention.py "${run[@]}"
part memory 240 "$python" bench/plan.py "${run[@]}" --measure
part plain 300 "$python" train_gpt.py "${short[@]}" "${run[@]}" --run-id "${id}_plain" --kernels false --fp8 false

cp "logs/$id"*.txt "$out"
# The same steps with the kernels and without: losses side by side.
losses() {
    grep -h '^step:.*val_loss' "$out/$1.txt" | tail -n 1 | grep . || echo none
}
{
    echo
    echo "Last validation with the kernels: $(losses training); without, in bf16: $(losses plain)"
    for name in step_time kernel_times attention memory; do
        printf '\n## %s\n\n' "$name"
        grep -v '%|' "$out/$name.txt"
    done
} >>"$summary"
cat "$summary"
