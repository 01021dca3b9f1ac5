#!/bin/bash
# One run on several machines under Slurm, which starts every rank itself, signals it, and starts the job again.
#
#     sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 configs/slurm.sh configs/smollm2-1.7b-4xl4.json [key=value ...]
#
# Two minutes before the time limit, and at a preemption, the ranks get SIGTERM, save together and end with status 75;
# the job then goes back to the queue and goes on from that checkpoint, unless it was a STOP file that ended it.
# output_dir and prepared_dir must be on storage that all machines share.
#SBATCH --job-name=smolpretrain
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec python run_pretrain.py "$@"' rank "$@"
status=$?

stopped='import launch, sys; sys.exit(not launch.asked_to_stop(launch.output_dir(["run_pretrain.py", *sys.argv[1:]])))'
if [ "$status" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] && ! python -c "$stopped" "$@"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
