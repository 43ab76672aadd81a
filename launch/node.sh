#!/usr/bin/env bash
# Start the ranks of this node: the one place where rendezvous flags are built.
#
#   bash launch/node.sh CONFIG RECIPE [key=value …]     CONFIG: a name from launch/accelerate, or a file
#
# Where this node stands comes from the first of these that is there:
#   Slurm     one task a node: srun sets SLURM_NNODES, SLURM_NODEID, SLURM_JOB_NODELIST
#   by hand   the same line on every host, with NNODES, NODE_RANK and MASTER_ADDR (and MASTER_PORT) set
#   neither   one machine
# GPUS_PER_NODE  ranks of a node (default: the GPUs that are here, one rank without any)
# GUARDTRAIN_LOG_DIR  where each rank's output goes besides
# DRY_RUN=1      print the command and start nothing
#
# Exits with the run's code: 0 done, 2 bad input, 75 stopped before its end with a checkpoint, 130 stopped by Ctrl-C.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ $# -ge 2 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2; }
config=$1
shift
[ -f "$config" ] || config=$root/launch/accelerate/$config.yaml
[ -f "$config" ] || {
  names=$(basename -a -s .yaml "$root"/launch/accelerate/*.yaml | tr '\n' ' ')
  echo "node.sh: no such accelerate configuration, expected a file or one of: $names, found ${config##*/}" >&2
  exit 2
}

# The address that Slurm knows a node by; its name need not resolve.
slurm_address() {
  scontrol show node "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2
}
# The job's GPUs where Slurm says so, else those of the machine.
count_gpus() {
  echo "${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}"
}

if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  nodes=${SLURM_NNODES:-1} node=${SLURM_NODEID:-0}
  address=$(slurm_address)
  port=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 50000))}
else
  nodes=${NNODES:-1} node=${NODE_RANK:-0} address=${MASTER_ADDR:-127.0.0.1} port=${MASTER_PORT:-29500}
fi
gpus=$(count_gpus)
ranks=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}

command=(accelerate launch --config_file "$config" --num_machines "$nodes" --machine_rank "$node"
  --num_processes "$((nodes * ranks))" --main_process_ip "$address" --main_process_port "$port"
  --deepspeed_multinode_launcher standard)
[ -z "${GUARDTRAIN_LOG_DIR:-}" ] || command+=(--tee 3 --log_dir "$GUARDTRAIN_LOG_DIR/node$node")
command+=(-m guardtrain.train "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
# What torchrun allows the other ranks of this node to end in when one has failed, before it kills them. Slurm is to end all
# nodes within a minute; elsewhere a rank that was told to stop may finish its step and save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-${SLURM_JOB_ID:+20}}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# 2026-11: DeepSpeed, which accelerate imports, else warns that it found no GPU.
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

# torchrun exits with 1 whatever its ranks end with: the run says in a file how it ended. A job script that set one reads it itself.
if [ -n "${GUARDTRAIN_STATUS_FILE:-}" ]; then
  exec "${command[@]}"
fi
export GUARDTRAIN_STATUS_FILE
GUARDTRAIN_STATUS_FILE=$(mktemp)
trap 'rm -f "$GUARDTRAIN_STATUS_FILE"' EXIT
code=0
"${command[@]}" || code=$?
case $(cat "$GUARDTRAIN_STATUS_FILE") in
  done) exit 0 ;;
  refused) exit 2 ;;
  negative) exit 1 ;;
  preempted) exit 75 ;;
  interrupted) exit 130 ;;
  *) exit "$code" ;;
esac
