"""What studies can train on: real text, and two synthetic tasks.

The synthetic ones have statistical power: on them a sparse model and its dense
twin differ within minutes on a CPU. Every table says which task it is of.

Their sizes were chosen with two layers of M=64 and F=256, both sparse, 32 rows
of 64 bytes, AdamW 3e-3, after 1,000 steps, the dense twin against Switch with
8 experts, on two seeds: 2.32 and 2.32 against 2.21 and 2.21 nats per byte on 8
ciphers; 1.42 and 1.57 against 0.07 and 0.17 nats per token of a value (its end
is one) on 2,048 pairs. After 600 steps the pairs have only begun to be known,
and of 1,024 pairs both models know nearly all after 750.

An encoder-decoder reads the whole of its inputs at once. On real text its
decoder hardly looks at them within minutes (eight bytes after a prefix: 0.005
nats a byte between all of the encoder's tokens served and a tenth of them);
keys and values leave it no choice. Not here: how the data is made
(`moe_jax.data`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
  """What is learned.

  Attributes:
    overrides: Values that the task changes in the study's config, by dotted
      name; they are a later layer of it.
    label: What the task is called in tables.
    comparable: Whether published numbers can be held against the study's on
      this task.
  """

  overrides: Mapping[str, Any]
  label: str
  comparable: bool = True


_KV_RECALL = {
  'data.source.kind': 'kv_recall',
  'data.source.kv_recall.num_pairs': 2048,
  'data.task.kind': 'seq2seq',
}
# Tasks of causal models; a study is run on the first unless it is told another.
TASKS = {
  'text': Task(
    {'data.source.kind': 'python_stdlib'}, 'Python standard library, bytes'
  ),
  'cipher': Task(
    {'data.source.kind': 'cipher', 'data.source.cipher.num_ciphers': 8},
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
      # A model soon learns where a prefix ends.
      'model.positions.kind': 'learned',
    },
    'Python standard library, a few bytes after a prefix',
  ),
}
