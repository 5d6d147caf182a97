"""What a training's exit code says. slurm/job.sh decides by it whether a job is tried again."""

WRONG_INPUT = 2
STOPPED = 75  # by a signal, after a checkpoint: start it again to go on
BAD_LOSS = 76  # one that is not finite, or spikes
HANG = 77  # no progress for run.hang_timeout seconds
BAD_NODE = 78
INTERRUPTED = 130  # by Ctrl-C before training began, or by a second one; as a shell calls an end by SIGINT
LOST_RUN = 79  # the run folder was taken over by another start
