# What a site sets. Everything here can be overridden from the environment; source it in the login shell too, so that
# sbatch knows partition and account:   source slurm/env.sh && sbatch slurm/pretrain_7b.sh

# The scheduler.
[[ -z ${PARTITION:=} ]] || export SBATCH_PARTITION=$PARTITION
[[ -z ${ACCOUNT:=} ]] || export SBATCH_ACCOUNT=$ACCOUNT
: "${SRUN_ARGS:=}"        # more for every srun: --container-image=IMAGE --container-mounts=/shared:/shared
: "${MAX_RESTARTS:=3}"    # how often a job that fails is started again; preemption and time limits don't count

# Software. MODULES are loaded before the environment in VENV is activated.
: "${MODULES:=}"
: "${VENV:=.venv}"
: "${DEVICE:=cuda}"       # or cpu

# Paths, all on a disk that every node sees. Where one is empty, the config's own value holds.
: "${RUNS:=runs}"         # a job's run folder is RUN_DIR, else RUNS/JOB-NAME
: "${DUALTOKEN:=}"
: "${TEXT_TOKENIZER:=}"
: "${SHARDS:=}"           # shard sets, separated by commas

# What follows is for the job alone.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    cd "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}"
    [[ -z $MODULES ]] || module load $MODULES
    source "$VENV/bin/activate"
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" DEVICE
    : "${RUN_DIR:=$RUNS/$SLURM_JOB_NAME}"
    : "${SLURM_RESTART_COUNT:=0}"

    # Where its processes meet: the first node's address (this script runs there), and a port of the job's own, so that
    # two jobs can share a node.
    JOB_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
    MASTER_ADDR=$(hostname -I | awk '{print $1}')
    export JOB_NODES MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
fi
