"""The models that studies of fine-tuning begin with, and what they learn next.

A sparse decoder and its dense twin are pre-trained on the text of Python's
library, once for each seed. Fine-tuning goes on with short tasks that have an
instruction and an answer; only answers count in the loss. As in ST-MoE
(https://arxiv.org/abs/2202.08906) one layer in four is sparse, tokens choose
two experts, whose gates sum to one and the second of which is left out at
random where its gate is small, the capacity factor is 1.25 in training and 2 in
evaluation, and both auxiliary losses stay on. Unlike there, the models are
decoders of bytes.
Not here: what a study changes in fine-tuning.
"""

import copy
import functools
from collections.abc import Sequence

import ml_collections

from configs import base
from experiments.study import byte_models
from experiments.study.jobs import layered
from experiments.study.parts import Column, Preset
from experiments.study.starts import Start
from experiments.study.tasks import Task
from moe_jax.data import InstructionSource, instructions
from moe_jax.run_config import RunConfig

# Names of the models that are pre-trained.
SPARSE, DENSE = 'sparse, pre-trained', 'dense, pre-trained'
# Clusters of tasks that are generated, whose examples are short.
CLUSTERS = ('sequences', 'letters', 'number_series', 'arithmetic', 'ciphers')
TASKS = {
  'instructions': Task(
    {},
    'generated tasks with instructions, after the Python standard library as '
    'bytes',
    comparable=False,
  )
}
LOSS = Column('loss', f'eval/{byte_models.EVAL}/loss', 'nats/token')
_SEQ_LEN = 96


def config(steps: int) -> ml_collections.ConfigDict:
  """Config of fine-tuning on all tasks of `CLUSTERS` in equal shares.

  Args:
    steps: Number of optimizer steps of fine-tuning.
  """
  config = byte_models.decoder(
    steps, hidden=256, num_layers=4, num_experts=32, num_selected=2
  )
  m = config.model
  m.moe.layers = 'every 4'
  m.moe.expert.hidden = 128  # two of them are a dense layer's 256
  m.moe.capacity.kind = 'per_token'
  m.moe.capacity.per_token.factor = 1.25
  router = m.moe.router.token_choice
  router.gates = 'renormalized'
  router.second_policy = 'threshold'
  router.z_weight = 1e-3
  config.batch_size = 16
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule.warmup_steps = steps // 10
  config.data.seq_len = _SEQ_LEN
  config.data.task.kind = 'seq2seq'
  mixture = config.data.mixture
  for name, task in instructions.TASKS.items():
    if task.cluster in CLUSTERS:
      mixture.sources[name] = base.source(InstructionSource(task=name))
  mixture.rule = 'given'
  room = {'capacity': {'per_token': {'factor': 2.0}}}
  config.evals = {byte_models.EVAL: byte_models.evaluation(moe=room)}
  return config


def pretrained(preset: Preset) -> Sequence[Start]:
  """The sparse model and its dense twin, before fine-tuning."""
  train = functools.partial(_pretraining, steps=preset.start_steps)
  twin = functools.partial(train, num_experts=0)
  return [Start(SPARSE, train), Start(DENSE, twin)]


def _pretraining(
  shared: ml_collections.ConfigDict, steps: int, **moe: int
) -> ml_collections.ConfigDict:
  """Config of pre-training of the model that `shared` fine-tunes."""
  config = base.get_config()
  config.model = copy.deepcopy(shared.model)
  config.total_steps = steps
  config.log_every_steps = max(steps // 10, 1)
  config.batch_size = 32
  config.data.seq_len = _SEQ_LEN
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule.warmup_steps = min(100, steps // 8)
  config.checkpoint.every_steps = 0
  config.checkpoint.keep_best = False
  changes = {f'model.moe.{name}': value for name, value in moe.items()}
  return layered(RunConfig, base.finish(config), changes)
