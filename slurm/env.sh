# Sourced by the job scripts, from the checkout that the job was submitted in.
# VENV: the environment (default .venv); GPUs of a node come from the job's --gpus-per-node.

cd "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}"
source "${VENV:-.venv}/bin/activate"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# The first node's address, where all nodes meet; a port of the job's own, so that two jobs can share a node.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_address=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname -I | awk '{print $1}')
head_port=$((20000 + SLURM_JOB_ID % 10000))
