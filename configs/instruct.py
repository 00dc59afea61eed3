"""Instruction tuning from scratch, with two clusters of tasks held out.

A decoder of the size of `tiny_switch.py` learns the tasks of the package, which
are made from Python's own library and generators, in equal shares. The held-out
clusters are evaluated, and never trained on. Training takes about a quarter of
an hour on two cores, and nothing is downloaded. At the end the score of every
task is printed, with means over tasks and over clusters.

    python -m moe_jax.main --config=moe_jax:instruct --workdir=runs/instruct
    python -m moe_jax.generate --workdir=runs/instruct --temperature=0 \
      --prompt='Reverse: abcde'

To begin with a pre-trained model, add `--config.init_from.workdir=runs/tiny`.
"""

from moe_jax.configs import base, tiny_switch
from moe_jax.data import InstructionSource, instructions
from moe_jax.evaluation import SourceLosses, SourceScores

HELD_OUT = 'recall,code_reading'


def get_config(arg: str = ''):
  config = tiny_switch.get_config()
  config.total_steps = 2000
  config.data.task.kind = 'seq2seq'
  config.data.seq_len = 256
  mixture = config.data.mixture
  for name in instructions.TASKS:
    mixture.sources[name] = base.source(InstructionSource(task=name))
  mixture.rule = 'given'
  mixture.held_out = HELD_OUT
  mixture.period = 270
  config.sample.prompt = 'Reverse: abcde'
  config.sample.num_tokens = 16
  config.sample.temperature = 0.0
  config.evals.losses = base.entry(SourceLosses, every_steps=500, num_batches=2)
  config.evals.scores = base.entry(SourceScores, num_questions=20)
  return base.finish(config, arg)
