# What differs between sites. Copy to slurm/env.sh; slurm/train.sbatch reads it on the first node, before srun.

# The environment with guardtrain in it.
# module load cuda/12.8
# source /shared/venvs/guardtrain/bin/activate

# One network for all nodes; `ip -br address` names it.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0

# Models and tokenizers on a disk that all nodes see, and no node asking the Hub.
# export HF_HOME=/shared/huggingface
# export HF_HUB_OFFLINE=1

# Pinned memory for offload needs room; some sites do not pass this on to the nodes, there it is the node's own setting.
# ulimit -l unlimited

# Sites that bind each task to a few cores starve the ranks that launch/node.sh starts.
# export SLURM_CPU_BIND=none
