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
gpus=$("$PYTHON" -c 'import signal; signal.signal(2, signal.SIG_DFL); import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then preset=record; else preset=tiny; fi

# What the arguments say about the preset, and whether they bring data of their own or ask for no run.
named=no own_data=no previous=
for argument in "$@"; do
    case "$argument" in --preset=*) named=yes preset=${argument#--preset=} ;; esac
    case "$previous" in --preset) named=yes preset=$argument ;; esac
    case "$argument" in --train-files*|--dry-run|--help|-h) own_data=yes ;; esac
    previous=$argument
done
if [ "$own_data" = no ]; then
    case "$preset" in
        record | next) "$PYTHON" data/cached_fineweb10B.py 9 ;;
        mini | tiny)
            "$PYTHON" data/embedded.py
            set -- --checkpoint-last --sample-every 500 ${1+"$@"} # something to look at
            ;;
    esac
fi
if [ "$named" = no ]; then set -- --preset "$preset" ${1+"$@"}; fi

processes=${NPROC:-$((gpus > 0 ? gpus : 1))}
if [ "$processes" -eq 1 ] && [ "$nodes" -eq 1 ]; then exec "$PYTHON" train_gpt.py "$@"; fi
if [ "$nodes" -eq 1 ]; then
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$processes" train_gpt.py "$@"
fi
exec "$PYTHON" -m torch.distributed.run --nproc_per_node="$processes" --nnodes="$nodes" --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}" train_gpt.py "$@"
