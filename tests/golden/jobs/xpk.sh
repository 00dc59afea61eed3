#!/bin/bash
# configs/mixtral_8x7b.py on 2 x 64 chips of v5p-128 (4x4x4) in 32 machines; mesh: data 2, fsdp 16, expert 4, tensor 1
# The workdir is in a storage that `xpk storage attach` has mounted. Status 75
# says that SIGTERM stopped the run, 1 also that another process was lost.
xpk workload create \
  --workload=mixtral-8x7b \
  --cluster=c \
  --tpu-type=v5p-128 \
  --num-slices=2 \
  --docker-image=my-image \
  --max-restarts=20 \
  --restart-on-exit-codes=1,75 \
  --termination-grace-period-seconds=300 \
  --command='python -m moe_jax.main --config=configs/mixtral_8x7b.py --workdir=/shared/runs/run --config.mesh.expert=4 --config.mesh.dcn_data=2 --config.microbatches=4 '"'"'--config.sample.prompt=it is'"'"''
