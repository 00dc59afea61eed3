"""The deep mixture of experts of 2013 on jittered digits, in a minute.

Two gated layers of four experts each (arXiv:1312.4314) on scikit-learn's 8x8
digits at random positions on a 14x14 canvas; the balancing constraint holds for
the first half of training, then it is lifted. With MNIST prepared by TFDS:
--config.data.source.kind=tfds --config.data.source.tfds.name=mnist
--config.data.validation_split=test.

    python -m moe_jax.main --config=moe_jax:eigen_digits --workdir=runs/eigen
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.total_steps = 4000
  config.batch_size = 32
  config.log_every_steps = 200
  config.data.task.kind = 'classes'
  config.data.source.kind = 'digits'
  config.data.source.digits.canvas = 14
  config.data.seq_len = 1
  config.model.kind = 'deep_moe'
  config.model.deep_moe.num_experts = (4, 4)
  config.model.deep_moe.hidden = (64, 32)
  config.model.deep_moe.gate_hidden = (16, 16)
  config.model.deep_moe.margin = 32.0  # the size of a batch
  config.model.deep_moe.balance_steps = 2000
  config.optimizer.learning_rate = 2e-3
  config.optimizer.weight_decay = 0.0
  config.checkpoint.every_steps = 2000
  config.checkpoint.best_eval = 'valid'
  config.evals = dict(
    valid=base.evaluation(every_steps=1000),
    classes=base.classify_evaluation(every_steps=1000),
  )
  config.sample.num_tokens = 0
  return base.finish(config, arg)
