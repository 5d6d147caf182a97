#!/usr/bin/env bash
# Pre-tokenization on the nodes of one allocation:
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=128 slurm/tokenize.sh --config CONFIG.yaml workers.gpus=0.25 ...
# Inputs, output and tokenizers must be seen from all nodes. What is committed stays: submitted again, or requeued, the
# job goes on from there.
#SBATCH --job-name=tokenize
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}/slurm/env.sh"

# Only who knows this job's token may join its Ray.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
export RAY_gcs_rpc_server_reconnect_timeout_s=20  # seconds for which a node outlives the head, also at the end

# One task a node starts Ray there; the first one also runs the driver, and all stop with it. What the other nodes' Ray
# says goes to files of their own.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c '[[ $SLURM_NODEID == 0 ]] || exec &> "tokenize-$SLURM_JOB_ID.node$SLURM_NODEID.out"; exec "$@"' node \
    ray symmetric-run --address "$MASTER_ADDR:$MASTER_PORT" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats \
    -- python -u data_pipeline/tokenize.py "$@"
