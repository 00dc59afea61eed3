"""The mixture of experts of 1991 on four vowels, in seconds.

Four linear experts and a linear gate, the competitive error (Jacobs et al.,
https://doi.org/10.1162/neco.1991.3.1.79); `experiments/jacobs_table1.py` runs
the paper's comparison. The speakers are drawn around the means of Peterson and
Barney 1952; with a file of their table: --config.data.source.vowels.table=PATH.

    python -m moe_jax.main --config=moe_jax:jacobs_vowels --workdir=runs/1991
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.total_steps = 400
  config.batch_size = 50
  config.log_every_steps = 50
  config.data.task.kind = 'classes'
  config.data.source.kind = 'vowels'
  config.data.seq_len = 1
  config.model.kind = 'adaptive'
  config.model.adaptive.num_experts = 4
  config.optimizer.learning_rate = 0.1
  config.optimizer.weight_decay = 0.0
  config.optimizer.schedule.warmup_steps = 0
  config.checkpoint.every_steps = 0
  config.checkpoint.best_eval = 'valid'
  config.evals = dict(
    valid=base.evaluation(every_steps=100),
    classes=base.classify_evaluation(every_steps=100),
  )
  config.sample.num_tokens = 0
  return base.finish(config, arg)
