#!/usr/bin/env bash
# Sets up, and trains: the preset `record` on the GPUs that PyTorch sees here, or `tiny` on the CPU where there are none.
# Arguments go to train_gpt.py; relative paths in them count from this script's folder.
# Environment: NPROC (processes on this node), and for several nodes NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
set -euo pipefail
script=$0
while [ -L "$script" ]; do
    target=$(readlink "$script")
    case "$target" in /*) script=$target ;; *) script=$(dirname "$script")/$target ;; esac
done
CDPATH='' cd -- "$(dirname "$script")"

refuse() {
    echo "run.sh: $1" >&2
    exit 2
}

# whole NAME LOW HIGH: the variable, where it is set, must be a whole number in that range.
whole() {
    local value=${!1-}
    case "$value" in
        '') return ;;
        *[!0-9]* | ??????*) ;;
        *) if [ "$value" -ge "$2" ] && [ "$value" -le "$3" ]; then return; fi ;;
    esac
    refuse "$1=$value: must be a whole number from $2 to $3"
}

whole NPROC 1 65535
whole NNODES 1 65535
nodes=${NNODES:-1}
if [ "$nodes" -gt 1 ]; then
    if [ -z "${NODE_RANK:-}" ]; then refuse "NODE_RANK is not set: the number of this node, from 0 on"; fi
    if [ -z "${MASTER_ADDR:-}" ]; then refuse "MASTER_ADDR is not set: the address of node 0"; fi
    whole NODE_RANK 0 $((10#$nodes - 1))
    whole MASTER_PORT 1 65535
fi

. ./setup.sh

# By the Python that will run, so that CUDA_VISIBLE_DEVICES and a PyTorch without CUDA count.
count='import signal; signal.signal(2, signal.SIG_DFL)  # of Ctrl-C: no traceback
from torch import cuda; print(cuda.is_available() * cuda.device_count())'
gpus=$("$PYTHON" -c "$count")
if [ "$gpus" -gt 0 ]; then preset=record; else preset=tiny; fi
processes=${NPROC:-$((gpus > 0 ? gpus : 1))}
if [ "$gpus" -gt 0 ] && [ "$processes" -gt "$gpus" ]; then refuse "NPROC=$NPROC, but PyTorch sees $gpus GPUs"; fi

# What the arguments say: the preset, and whether they bring data of their own, number the slices, or ask for no run.
named=no own_data=no own_slices=no no_run=no previous=
for argument in "$@"; do
    case "$argument" in
        --preset=*) named=yes preset=${argument#--preset=} ;;
        --train-files*) own_data=yes ;;
        --slices*) own_slices=yes ;;
        --resume*) own_slices=yes named=yes ;; # the checkpoint has both
        --dry-run | --help | -h) no_run=yes ;;
    esac
    case "$previous" in --preset) named=yes preset=$argument ;; esac
    previous=$argument
done
if [ "$named" = no ]; then
    if [ "$gpus" -eq 0 ]; then echo "PyTorch sees no GPU here: preset tiny, on the CPU" || true; fi # nobody may read it
    set -- --preset "$preset" ${1+"$@"}
fi

case "$preset" in
    record | next)
        world=$((10#$processes * 10#$nodes))
        if [ "$gpus" -gt 0 ] && [ "$own_slices$no_run" = nono ]; then
            slices=$("$PYTHON" bench/plan.py --fit $world "$@") # as memory needs them
            set -- $slices "$@"
        fi
        if [ "$own_data$no_run" = nono ]; then
            # A mistake in the arguments shows before two gigabytes are fetched.
            WORLD_SIZE=$world RANK=0 MASTER_ADDR=- MASTER_PORT=1 "$PYTHON" train_gpt.py --dry-run "$@" >/dev/null
            "$PYTHON" data/cached_fineweb10B.py 9
        fi
        ;;
    mini | tiny)
        processes=${NPROC:-1} # whose batches are too small to share
        if [ "$own_data$no_run" = nono ]; then
            "$PYTHON" data/embedded.py
            set -- --checkpoint-last --sample-every 500 "$@" # something to look at
        fi
        ;;
esac

if [ "$processes" -eq 1 ] && [ "$nodes" -eq 1 ]; then exec "$PYTHON" train_gpt.py "$@"; fi
set -- train_gpt.py "$@"
if [ "$nodes" -eq 1 ]; then
    set -- --standalone "$@"
else
    set -- --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}" "$@"
    set -- --nnodes="$nodes" "$@"
fi
# Each process calls its GPU cuda:0, so that it can use what another has compiled.
if [ "$gpus" -gt 0 ]; then set -- --virtual-local-rank "$@"; fi
exec "$PYTHON" -m torch.distributed.run --nproc_per_node="$processes" "$@"
