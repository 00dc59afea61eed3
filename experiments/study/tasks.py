"""The tasks of studies: real text, and two synthetic tasks.

The synthetic tasks have statistical power: on them a sparse model and its dense
twin differ within minutes on a CPU. Every table names its task.

Their sizes were chosen by training two sparse layers of M=64 and F=256 for
1,000 steps of AdamW (rate 3e-3) on batches of 32 rows of 64 bytes, with two
seeds. The dense twin had losses of 2.32 and 2.32 nats a byte on 8 ciphers,
Switch with 8 experts 2.21 and 2.21. On 2,048 pairs of key and value they were
1.42 and 1.57 against 0.07 and 0.17 nats a token of the value (its end is one
too). After 600 steps the models have only begun to memorise the pairs, and of
1,024 pairs both models know nearly all after 750 steps.

An encoder-decoder reads the whole of its inputs at once. On real text its
decoder hardly uses them within minutes: the loss of eight bytes after a prefix
is 0.005 nats a byte higher if only a tenth of the encoder's tokens are served.
With keys and values it has to.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
  """Data for a study to train on.

  Attributes:
    overrides: Values that the task changes in the study's config, by dotted
      name.
    label: Name of the task in tables.
    comparable: Whether the study's numbers on this task can be compared to
      published ones.
  """

  overrides: Mapping[str, Any]
  label: str
  comparable: bool = True


_KV_RECALL = {
  'data.source.kind': 'experiments.study.kv_recall:KvRecallSource',
  'data.source.custom': {'num_pairs': 2048},
  'data.task.kind': 'seq2seq',
}
# Tasks of causal models; the first is a study's default.
TASKS = {
  'text': Task(
    {'data.source.kind': 'python_stdlib'}, 'Python standard library, bytes'
  ),
  'cipher': Task(
    {
      'data.source.kind': 'experiments.study.cipher:CipherSource',
      'data.source.custom': {'num_ciphers': 8},
    },
    'synthetic: CIPHER-8, one text in 8 substitution ciphers',
  ),
  'kv_recall': Task(
    _KV_RECALL, 'synthetic: KV-RECALL, 2048 random keys and values by heart'
  ),
}
# Tasks of encoder-decoders.
PREFIX_TASKS = {
  'kv_recall': Task(
    {**_KV_RECALL, 'data.seq_len': 64, 'data.target_len': 48},
    'synthetic: KV-RECALL, an encoder reads 2048 keys, a decoder knows their '
    'values by heart',
  ),
  'text': Task(
    {
      'data.source.kind': 'python_stdlib',
      'data.task.kind': 'prefix_lm',
      'data.seq_len': 64,
      'data.target_len': 8,
      # With learned positions a model soon learns where a prefix ends.
      'model.positions.kind': 'learned',
    },
    'Python standard library, a few bytes after a prefix',
  ),
}
# Tasks of encoder-decoders whose encoder is compared: the decoder cannot tell
# the spans without it.
DENOISING_TASKS = {
  'text': Task(
    {
      'data.source.kind': 'python_stdlib',
      'data.task.kind': 'span_corruption',
      'data.seq_len': 128,
      'data.target_len': 32,
      'batch_size': 16,
    },
    'span corruption of the Python standard library, bytes',
  ),
  'kv_recall': PREFIX_TASKS['kv_recall'],
}
