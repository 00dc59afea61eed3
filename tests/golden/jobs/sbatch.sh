#!/bin/bash
# configs/mixtral_8x7b.py on 8 x 8 GPUs of h100 in 8 machines; mesh: data 1, fsdp 8, expert 8, tensor 1
#SBATCH --job-name=mixtral-8x7b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8  # a process for each GPU,
#SBATCH --gres=gpu:8  # all of which see all GPUs of their node
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@300  # the run saves five minutes before its time is up
#SBATCH --requeue  # after a preemption, or the loss of a node
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
#SBATCH '--account=my account'

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# The run ends its own processes, after they have saved.
srun --kill-on-bad-exit=0 python -m moe_jax.main \
  --config=configs/mixtral_8x7b.py \
  --workdir=/scratch/runs/run \
  --config.microbatches=8
status=$?
# 75: SIGTERM stopped the run, which has saved. Other failures end the job after
# 20 restarts.
if [ $status -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
elif [ $status -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  sleep 60
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
