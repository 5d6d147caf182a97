#!/usr/bin/env bash
# One task of an srun becomes one rank of torch.distributed: slurm/rank.sh COMMAND...
: "${SLURM_PROCID:?srun starts this}" "${SLURM_NTASKS:?}" "${SLURM_LOCALID:?}"
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%(*}  # "8(x4)": every node has as many
: "${MASTER_ADDR:?}" "${MASTER_PORT:?}"
exec env --block-signal=USR1 "$@"  # it waits until training can answer it
