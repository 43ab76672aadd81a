#!/usr/bin/env bash
# Start the ranks of this node: the one place where rendezvous flags are built.
#
#   bash launch/node.sh CONFIG RECIPE [key=value …]     CONFIG: a name from launch/accelerate, or a file
#
# Where this node stands comes from the first of these that is there:
#   by hand   the same line on every host, with NNODES, NODE_RANK and MASTER_ADDR (and MASTER_PORT) set
#   Slurm     one task a node, as slurm/train.sbatch starts them with srun
#   neither   one machine
# GPUS_PER_NODE       ranks of a node (default: the GPUs that are here, one rank without any)
# GUARDTRAIN_LOG_DIR  where each rank's output goes besides
# DRY_RUN=1           print the command and start nothing
#
# Exits with the run's code: 0 done, 2 bad input, 75 stopped before its end with a checkpoint, 130 stopped by Ctrl-C.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
refuse() {
  echo "node.sh: $1" >&2
  exit 2
}

[ $# -ge 2 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2; }
config=$1
shift
[ -f "$config" ] || config=$root/launch/accelerate/$config.yaml
[ -f "$config" ] ||
  refuse "no such accelerate configuration, expected a file or one of: $(basename -a -s .yaml "$root"/launch/accelerate/*.yaml | tr '\n' ' ')"

# How many GPUs this process may use: those it was given, else the job's, else the machine's.
count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  else
    echo "${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}"
  fi
}
# The address that Slurm knows the step's first node by; its name need not resolve.
slurm_address() {
  local first address
  first=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | head -n 1)
  address=$(scontrol show node "$first" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
  echo "${address:-$first}"
}

if [ -n "${NNODES:-}" ] || [ -z "${SLURM_JOB_NODELIST:-}" ]; then
  nodes=${NNODES:-1}
  if [ "$nodes" -gt 1 ] && [ -z "${NODE_RANK:-}" -o -z "${MASTER_ADDR:-}" ]; then
    refuse "NNODES=$nodes needs NODE_RANK, another one on each host, and MASTER_ADDR, the first host's address"
  fi
  node=${NODE_RANK:-0} address=${MASTER_ADDR:-127.0.0.1} port=${MASTER_PORT:-29500}
else
  nodes=${SLURM_STEP_NUM_NODES:-1} node=${SLURM_NODEID:-0}
  [ "${SLURM_STEP_NUM_TASKS:-$nodes}" = "$nodes" ] ||
    refuse "srun started $SLURM_STEP_NUM_TASKS tasks on $nodes nodes, expected one a node (--ntasks-per-node=1): it starts the ranks itself"
  port=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
  if [ "$nodes" -gt 1 ]; then address=${MASTER_ADDR:-$(slurm_address)}; fi
fi
if [ "$nodes" -eq 1 ]; then
  address=127.0.0.1 port=${MASTER_PORT:-0} # any port that is free
fi
gpus=$(count_gpus)
ranks=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}

is_single=$(grep -c "^distributed_type: 'NO'" "$config" || true)
if [ "$is_single" -gt 0 ] && [ "$((nodes * ranks))" -gt 1 ]; then
  refuse "${config##*/} is for one process, found $nodes nodes of $ranks ranks (ddp is for several)"
fi
if [ "${config##*/}" = single_gpu.yaml ]; then
  # One process needs no launcher, and accelerate's would leave it behind when it is told to stop.
  command=(python)
else
  command=(accelerate launch --config_file "$config" --num_machines "$nodes" --machine_rank "$node"
    --num_processes "$((nodes * ranks))" --main_process_ip "$address" --main_process_port "$port"
    --deepspeed_multinode_launcher standard)
  [ -z "${GUARDTRAIN_LOG_DIR:-}" ] || command+=(--tee 3 --log_dir "$GUARDTRAIN_LOG_DIR/node$node")
fi
command+=(-m guardtrain.train "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

# Threads of a rank: launchers say one, and DeepSpeed's optimizer for offload computes on the host.
threads=$((${SLURM_CPUS_ON_NODE:-$(nproc)} / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# 2026-11: DeepSpeed, which accelerate imports, else warns that it found no GPU.
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

# A job script that set a status file reads it itself.
if [ -n "${GUARDTRAIN_STATUS_FILE:-}" ]; then
  # When one rank has failed, torchrun ends the others of its node within this time: Slurm is to end all nodes within a minute.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-20}
  # Slurm's SIGTERM reaches every process: the ranks save, and torchrun must not kill them meanwhile.
  trap '' TERM
  export PET_SIGNALS_TO_HANDLE=SIGINT
  exec "${command[@]}"
fi
# A rank that is told to stop finishes its step and saves.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# torchrun exits with 1 whatever its ranks end with: the run says in a file how it ended.
export GUARDTRAIN_STATUS_FILE
GUARDTRAIN_STATUS_FILE=$(mktemp)
trap 'rm -f "$GUARDTRAIN_STATUS_FILE"' EXIT
set -m # in a process group of its own, so that a signal reaches it once, from here
"${command[@]}" &
child=$!
set +m
trap 'kill -INT "$child"' INT
trap 'kill -TERM "$child"' TERM HUP
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a trap ended the waiting, not the command
  code=0
  wait "$child" || code=$?
done
case $(cat "$GUARDTRAIN_STATUS_FILE") in
  done) exit 0 ;;
  negative) exit 1 ;;
  refused) exit 2 ;;
  preempted | stopped) exit 75 ;;
  interrupted) exit 130 ;;
  *) exit "$code" ;;
esac
