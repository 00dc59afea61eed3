"""Fine-tuning of a trained run in small batches, its experts unchanged.

It begins with the parameters of `tiny_switch.py` and learns to write docstrings
after functions, with the experts kept as they are. Flags name the folder of the
other run, and may have other parameters trained, as here the experts alone:

    python -m moe_jax.main --config=moe_jax:tiny_switch --workdir=runs/tiny
    python -m moe_jax.main --config=moe_jax:finetune \
      --workdir=runs/finetuned --config.init_from.workdir=runs/tiny \
      --config.trainable=experts

More flags for a small task: `--config.early_stopping.patience=3` ends the run
once its evaluation gets no better, `--config.init_from.keep_optimizer` goes on
with the other run's moments, `--config.aux_losses.factor=0.0` switches the
routers' losses off; `config.optimizer.rate_rules` has rates by part.

`--config.lora.rank=8 --config.trainable=all` trains low-rank adapters alone.

The other run must have the same model; its tokenizer is kept.
"""

from moe_jax.configs import base, tiny_switch


def get_config(arg: str = ''):
  config = tiny_switch.get_config()
  config.init_from.workdir = 'runs/tiny'
  config.trainable = 'non_experts'
  config.total_steps = 300
  config.batch_size = 8
  config.optimizer.learning_rate = 1e-3
  config.data.task.kind = 'seq2seq'
  config.data.source.kind = 'python_stdlib_docstrings'
  config.data.seq_len = 256
  config.sample.prompt = 'def double(x):\n  return 2 * x\n'
  config.sample.num_tokens = 64
  config.sample.temperature = 0.0
  for entry in config.evals.values():
    entry.every_steps = 100
  return base.finish(config, arg)
