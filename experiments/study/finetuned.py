"""The models that studies of fine-tuning begin with, and what they learn next.

A sparse decoder and its dense twin are pre-trained on the text of Python's
library, once for each seed. Fine-tuning goes on with short tasks that have an
instruction and an answer; only answers count in the loss. As in ST-MoE
(https://arxiv.org/abs/2202.08906) one layer in four is sparse, tokens choose
two experts, whose gates sum to one and the second of which is left out at
random where its gate is small, the capacity factor is 1.25 in training and 2 in
evaluation, and both auxiliary losses stay on. Unlike in the paper, the models
are decoders of bytes. Factors count slots a token, as in the paper, so that
1.25 has slots for five choices of eight in training, and their tokens are
served in order, each with both choices, which no later token changes. Late
tokens are then dropped whole, so that such sparse models are not compared with
their dense twins, but with each other.

The papers' code serves first choices before second ones. So do the models of
`all_sparse`, on which sparse is compared with dense. They have two layers, both
of which are sparse: one layer of four is worth hardly anything at this size.
Those of `ciphered` are pre-trained on text in eight ciphers and fine-tuned on
text of other modules in the same ones, since there is much to know of ciphers
(`tasks.py`), and little is learned of generated tasks within minutes. The rate
of pre-training is one for sparse and dense models. Unlike that of fine-tuning
it is not searched, so that what is between them may be that rate.
"""

import copy
import functools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from experiments.study import byte_models
from experiments.study.parts import ANY, Column, Preset, Row, Start, percent
from experiments.study.tasks import Task
from moe_jax.configs import base
from moe_jax.data import InstructionSource, instructions

# Names of the models that are pre-trained.
SPARSE, DENSE = 'sparse, pre-trained', 'dense, pre-trained'
# For each model, the start of its arms and what they change in the config.
MODELS = {
  'sparse': (SPARSE, {}),
  'dense': (DENSE, {'model.moe.num_experts': 0}),
}
# Clusters of tasks that are generated, whose examples are short.
CLUSTERS = ('sequences', 'letters', 'number_series', 'arithmetic', 'ciphers')
LOSS = Column('loss', f'eval/{byte_models.EVAL}/loss', 'nats/token')
# The evaluation of the split that is trained on, and its columns.
TRAINED = 'trained'
TRAINED_LOSS = Column('training loss', f'eval/{TRAINED}/loss', 'nats/token')
DROPPED = percent(
  'dropped in training', 'train/drop_rate', '% of choices', 1, ANY
)
GAP = Column('gap', unit='nats/token')
GAP_COLUMNS = [LOSS, TRAINED_LOSS, GAP]
_SEQ_LEN = 96
# Modules of Python's library that `ciphered` models are pre-trained on, and the
# topic that they are fine-tuned on, the network.
_GENERAL = (
  'asyncio,xml,multiprocessing,unittest,_pydecimal,importlib,logging,inspect,'
  'typing,tarfile,doctest,argparse'
)
_TOPIC = 'email,http,urllib,html,mailbox,xmlrpc,imaplib,wsgiref'
# Changes of an arm whose experts have one slot each, and the name of the row of
# what it loses by that.
_FACTOR = 'moe.capacity.per_token.factor'
NEARLY_ALL_DROPPED = {
  f'model.{_FACTOR}': 0.001,
  f'evals.{byte_models.EVAL}.model_overrides.{_FACTOR}': 0.001,
}
WORTH = 'worth of the sparse layers'
# Rates that are searched, and the reason why quick presets decide nothing.
RATES = (0.0013, 0.0032, 0.008, 0.02)
TOO_SHORT = 'models have hardly begun to differ'
# What pages say of the rate of pre-training of `all_sparse` models.
UNSEARCHED = (
  'Pre-training has a rate of 0.008, which was searched for neither model: a '
  'difference of sparse and dense may be one of that rate.'
)
CIPHERED = (
  'synthetic: modules on the network in 8 substitution ciphers, after other '
  'modules of the Python standard library in the same ciphers'
)
CIPHERED_TASKS = {'cipher': Task({}, CIPHERED)}


def config(
  steps: int, clusters: Sequence[str] = CLUSTERS, **source: int
) -> ConfigDict:
  """Config of fine-tuning on all tasks of some clusters in equal shares.

  Args:
    steps: Number of optimizer steps of fine-tuning.
    clusters: Names of the clusters.
    **source: Options of every task's examples; see `InstructionSource`.
  """
  # Two experts are as wide as a dense layer.
  config = byte_models.decoder(
    steps, num_layers=4, num_experts=32, num_selected=2, expert_hidden=128
  )
  moe = config.model.moe
  moe.layers = 'every 4'
  moe.capacity.update(kind='per_token', per_token={'factor': 1.25})
  moe.router.token_choice.update(
    gates='renormalized', second_policy='threshold', z_weight=1e-3
  )
  config.batch_size = 16
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule.warmup_steps = steps // 10
  config.data.seq_len = _SEQ_LEN
  config.data.task.kind = 'seq2seq'
  mixture = config.data.mixture
  for name, task in instructions.TASKS.items():
    if task.cluster in clusters:
      options = InstructionSource(task=name, **source)
      mixture.sources[name] = base.source(options)
  mixture.rule = 'given'
  config.evals = {byte_models.EVAL: byte_models.with_slots(2.0)}
  return config


def all_sparse(config: ConfigDict) -> ConfigDict:
  """The config with two layers, both sparse, which are served as in the papers.

  First choices are served before second ones, so that later tokens may decide
  whether a second choice finds a slot.
  """
  config.model.num_layers = 2
  config.model.moe.update(layers='all', allow_future_leak=True)
  config.model.moe.router.token_choice.slot_priority = 'choice_major'
  return config


def ciphered(steps: int) -> ConfigDict:
  """Config of fine-tuning on text of a topic in eight ciphers.

  Args:
    steps: Number of optimizer steps of fine-tuning.
  """
  shared = all_sparse(config(steps, clusters=()))
  shared.data = base.get_config().data
  shared.data.seq_len = 64
  _encipher(shared, _TOPIC)
  return shared


def _encipher(config: ConfigDict, modules: str) -> None:
  """Changes a config to text of some modules in eight ciphers."""
  kind = 'experiments.study.cipher:CipherSource'
  config.data.source.update(kind=kind, custom={'modules': modules})


def length(steps: int, log_every: int) -> dict[str, int]:
  """Changes of an arm of so many steps, a tenth of which warm up."""
  keys = 'total_steps', 'optimizer.schedule.warmup_steps', 'log_every_steps'
  return dict(zip(keys, (steps, steps // 10, log_every)))


def with_gap(row: Row) -> Row:
  """The row with the gap of both splits: by how much a model overfits."""
  losses = (row.values[column.name] for column in (LOSS, TRAINED_LOSS))
  return row.plus({GAP.name: np.subtract(*losses).tolist()})


def minus(name: str, row: Row, other: Row) -> Row:
  """A row of differences, paired by seed, in all columns of both rows."""
  values = {
    column: np.subtract(numbers, other.values[column]).tolist()
    for column, numbers in row.values.items()
    if column in other.values
  }
  return Row(name, values, difference=True)


def tasks(learned: str) -> dict[str, Task]:
  """The one task of a study, which names what is learned after pre-training.

  Args:
    learned: Examples that are learned, in words; equal words have equal ones.
  """
  label = f'{learned}, after the Python standard library as bytes'
  return {'instructions': Task({}, label)}


def pretrained(preset: Preset) -> Sequence[Start]:
  """The sparse model and its dense twin, before fine-tuning."""
  config = functools.partial(_pretraining, steps=preset.start_steps)
  return [Start(name, config, overrides=x) for name, x in MODELS.values()]


def _pretraining(shared: ConfigDict, steps: int) -> ConfigDict:
  """Config of pre-training of the model that `shared` fine-tunes."""
  config = base.get_config()
  config.model = copy.deepcopy(shared.model)
  byte_models.shorten(config, steps)
  config.batch_size = 32
  config.data.seq_len = shared.data.seq_len
  if 'modules' in shared.data.source.custom:
    _encipher(config, _GENERAL)
  # Searches from scratch gave 0.008 for sparse and dense models alike
  # (`deepseek_table1`); older studies have 0.003.
  is_all_sparse = config.model.moe.layers == 'all'
  config.optimizer.learning_rate = 8e-3 if is_all_sparse else 3e-3
  return base.finish(config)
