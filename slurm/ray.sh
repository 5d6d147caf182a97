# Sourced by jobs that spread work with Ray over the nodes of their allocation.

# Only who knows this job's token may join its Ray.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
export RAY_gcs_rpc_server_reconnect_timeout_s=20  # seconds for which a node outlives the head, also at the end

# on_ray NAME COMMAND...: one task a node starts Ray there; the first one also runs COMMAND, and all stop with it. What
# the other nodes' Ray says goes to files of their own, NAME-JOB.nodeN.out.
on_ray() {
    local name=$1
    shift
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        bash -c '[[ $SLURM_NODEID == 0 ]] || exec &> "$0-$SLURM_JOB_ID.node$SLURM_NODEID.out"; exec "$@"' "$name" \
        ray symmetric-run --address "$MASTER_ADDR:$MASTER_PORT" --min-nodes "$SLURM_JOB_NUM_NODES" \
        --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats -- "$@"
}
