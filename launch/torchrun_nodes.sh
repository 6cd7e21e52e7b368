#!/usr/bin/env bash
# Several machines without a scheduler: run this on each of them, with its own NODE_RANK and all else the same.
#
#   node0$ NODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun_nodes.sh train.py --epochs 3
#   node1$ NODES=2 NODE_RANK=1 MASTER_ADDR=node0 launch/torchrun_nodes.sh train.py --epochs 3
#
# Variables, with their defaults:
#   NODES            machines: must be given
#   NODE_RANK        this machine's number, from 0: must be given
#   MASTER_ADDR      name or address of machine 0, as all machines know it: must be given
#   MASTER_PORT      29400: free on machine 0, and reachable from all
#   NPROC            ranks of each machine: one for each NVIDIA GPU, or 2 without any
#   PYTHON           python: that of your environment
#   BIND             1: each rank on its own cores; 0 with GPUs
#   OMP_NUM_THREADS  threads of each rank: physical cores / NPROC
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME
#                    the network interface of the messages, such as eth0: needed where a machine has several, or where
#                    its own name leads to 127.0.1.1
set -euo pipefail
if [[ $# == 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  [[ $# == 0 ]] && exit 2
  exit 0
fi
MASTER_PORT="${MASTER_PORT:-29400}"
PYTHON="${PYTHON:-python}"
gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
NPROC="${NPROC:-$((gpus > 0 ? gpus : 2))}"
BIND="${BIND:-$((gpus == 0))}"
given=(PYTHON NODES NODE_RANK MASTER_ADDR)
numbers=(NODES NPROC MASTER_PORT OMP_NUM_THREADS)
commands=(PYTHON)
# What cannot be is refused before anything is started; the same lines in every file of this folder.
refuse() {
  echo "expected $1; got '$2': $3" >&2
  exit 2
}
for name in "${given[@]}"; do
  remedy="see ${0##*/} --help"
  [[ $name != SLURM_* ]] || remedy="start this file with sbatch"
  [[ -n ${!name:-} ]] || refuse "$name to be set" "" "$remedy"
done
for name in "${numbers[@]}"; do
  [[ ${!name:-1} =~ ^[1-9][0-9]{0,8}$ ]] || refuse "$name to be a whole number from 1" "${!name}" "set it to such a number"
done
for name in "${commands[@]}"; do
  type -P "${!name}" >/dev/null || refuse "$name to be a program" "${!name}" "set it to a name on PATH, or to a path"
done
[[ $BIND =~ ^[01]$ ]] || refuse "BIND to be 0 or 1" "$BIND" "set it to one of them, or leave it out"
((MASTER_PORT <= 65535)) || refuse "MASTER_PORT to be at most 65535" "$MASTER_PORT" "choose one from 1024 on"
[[ $MASTER_ADDR != *[[:space:]]* ]] || refuse "MASTER_ADDR to be a name or an address" "$MASTER_ADDR" "give one of machine 0"
[[ $NODE_RANK =~ ^(0|[1-9][0-9]{0,8})$ && $NODE_RANK -lt $NODES ]] ||
  refuse "NODE_RANK to be a whole number below NODES=$NODES" "$NODE_RANK" "number the machines from 0"
# The physical cores that this shell may use, one CPU of each.
read -ra cores <<<"$("$PYTHON" -c '
import os
def core(cpu):
    try:
        return open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read()
    except OSError:
        return cpu
print(*sorted({core(cpu): cpu for cpu in sorted(os.sched_getaffinity(0), reverse=True)}.values()))')"
threads=$((${#cores[@]} > NPROC ? ${#cores[@]} / NPROC : 1))

# What makes training fast on CPUs and safe on GPUs; the same lines in every file of this folder.
# Threads beyond the cores of a rank take other ranks' cores away.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
# glibc returns the memory of large tensors to the kernel at every step, and fresh pages cost more than the arithmetic;
# these three keep it (the first alone makes it worse).
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
# A message over NCCL that does not end in time ends its process: torch's default, unless a shell has turned it off.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
# At that end every rank writes down its last messages, which show the rank that sent another one, or none.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# NCCL gives reasons for its errors.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Each rank stays on cores of its own: threads that wander lose their caches. GPUs' ranks wait more than they compute.
run=("$PYTHON")
if [[ $BIND == 1 ]] && ((NPROC * OMP_NUM_THREADS <= ${#cores[@]})) && command -v taskset >/dev/null; then
  export CORES="${cores[*]}"
  # shellcheck disable=SC2016  # each rank expands it
  run=(bash -c 'read -ra c <<<"$CORES"
    mine=("${c[@]:LOCAL_RANK * OMP_NUM_THREADS:OMP_NUM_THREADS}")
    exec taskset --cpu-list "$(IFS=,; echo "${mine[*]}")" "$@"' rank "$PYTHON")
fi

command=("$PYTHON" -m torch.distributed.run --nnodes "$NODES" --node-rank "$NODE_RANK"
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --nproc-per-node "$NPROC" --no-python "${run[@]}" "$@")
printf '%q ' "${command[@]}" >&2
echo >&2
exec "${command[@]}"
