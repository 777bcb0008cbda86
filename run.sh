#!/usr/bin/env bash
# Sets up, and trains: the preset `record` on all NVIDIA GPUs of this machine, or `tiny` on the CPU where there are none.
# Arguments go to train_gpt.py. Environment: NPROC (processes on this node), and for several nodes NNODES, NODE_RANK,
# MASTER_ADDR, MASTER_PORT.
set -euo pipefail
CDPATH='' cd -- "$(dirname "$0")"
. ./setup.sh

gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
if [ "$gpus" -gt 0 ]; then preset=record; else preset=tiny; fi

# What the arguments say about the preset, and whether they bring data of their own or ask for no run.
named=no own_data=no previous=
for argument in "$@"; do
    case "$argument" in --preset=*) named=yes preset=${argument#--preset=} ;; esac
    case "$previous" in --preset) named=yes preset=$argument ;; esac
    case "$argument" in --train-files*|--dry-run|--help|-h) own_data=yes ;; esac
    previous=$argument
done
if [ "$named" = no ]; then set -- --preset "$preset" ${1+"$@"}; fi
if [ "$own_data" = no ]; then
    case "$preset" in
        record) "$PYTHON" data/cached_fineweb10B.py 9 ;;
        tiny) "$PYTHON" data/embedded.py ;;
    esac
fi

processes=${NPROC:-$((gpus > 0 ? gpus : 1))}
if [ "$processes" -eq 1 ] && [ "${NNODES:-1}" -eq 1 ]; then exec "$PYTHON" train_gpt.py "$@"; fi
if [ "${NNODES:-1}" -eq 1 ]; then
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$processes" train_gpt.py "$@"
fi
exec "$PYTHON" -m torch.distributed.run --nproc_per_node="$processes" --nnodes="$NNODES" \
    --node_rank="${NODE_RANK:?is not set}" --master_addr="${MASTER_ADDR:?is not set}" \
    --master_port="${MASTER_PORT:-29500}" train_gpt.py "$@"
