"""Models refuse batches that do not fit, and runs that memory cannot hold."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moe_jax import models
from moe_jax.data import DataOptions
from moe_jax.devices import check_room
from moe_jax.models.pattern import sparse_numbers, sparse_pattern
from moe_jax.run_config import RunConfig
from tests.bad_inputs.cases import Case, check

B, T, V = 2, 6, 11
TINY = {'vocab_size': V, 'width': 8, 'num_layers': 2}
TOKENS = jnp.ones((B, T), jnp.int32)
MASK = jnp.ones((B, T), bool)
DECODER = models.DecoderOptions(**TINY).build()
LSTM = models.LstmLmOptions(**TINY).build()
BOTH = models.EncoderDecoderOptions(**TINY).build()


def case(name, model, phrases, *arguments, **keywords):
  def call(folder):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), *arguments, **keywords)
    )

  return Case(name, call, phrases)


CASES = [
  case(f'{name}-{defect}', model, phrases, *arguments)
  for name, model in {'decoder': DECODER, 'lstm': LSTM}.items()
  for defect, phrases, arguments in (
    ('rank 1', ('(6,)', '[B, T]'), (TOKENS[0],)),
    ('rank 3', ('(1, 2, 6)', '[B, T]'), (TOKENS[None],)),
    ('no rows', ('(0, 6)', 'at least 1'), (TOKENS[:0],)),
    ('no tokens', ('(2, 0)', 'at least 1'), (TOKENS[:, :0],)),
    ('floats', ('tokens', 'float32', 'int'), (TOKENS * 1.0,)),
    ('text', ("tokens='a b'", 'array'), ('a b',)),
    ('nothing', ('tokens=None',), (None,)),
    ('segments', ('(2, 5)', '(2, 6)'), (TOKENS, TOKENS[:, 1:])),
    ('segments of rows', ('(1, 6)', '(2, 6)'), (TOKENS, TOKENS[:1])),
    ('a mask for segments', ('segment_ids', 'bool', 'int'), (TOKENS, MASK)),
    ('positions', ('(6,)', '[B, T]'), (TOKENS, TOKENS, TOKENS[0])),
    ('float positions', ('positions', 'float'), (TOKENS, None, TOKENS * 0.5)),
  )
]
CASES += [
  case('both-rows', BOTH, ('(1, 6)', '(2, 6)'), TOKENS, TOKENS[:1]),
  case('both-rank', BOTH, ('(6,)', '[B, S]'), TOKENS[0], TOKENS),
  case(
    'both-one has segments',
    BOTH,
    ('encoder_segment_ids and segment_ids',),
    *(TOKENS, TOKENS, TOKENS),
  ),
  case(
    'both-segments',
    BOTH,
    ('encoder_segment_ids', '(2, 5)'),
    *(TOKENS, TOKENS, TOKENS[:, 1:], TOKENS),
  ),
]


def pattern_cases(layers, num_layers, *phrases):
  return [
    Case(
      f'{f.__name__}-{layers}',
      lambda folder, f=f: f(layers, num_layers),
      phrases,
    )
    for f in (sparse_pattern, sparse_numbers)
  ]


CASES += pattern_cases('every 9', 4, "'every 9'", 'num_layers=4')
CASES += pattern_cases('last 9', 1, "'last 9'", 'num_layers=1')
CASES += pattern_cases('1,7', 4, "'1,7'", 'num_layers=4')
CASES += pattern_cases('odd', 4, "'odd'", "'every N'")
CASES += pattern_cases('all', 0, 'num_layers=0')
CASES += pattern_cases('every 0', 4, "'every 0'")


def check_run(model, batch_size=8, seq_len=16, **options):
  data = DataOptions(seq_len=seq_len)
  run_options = RunConfig(
    model=model, batch_size=batch_size, data=data, **options
  )
  check_room(run_options.least_bytes(), jax.devices()[:1])


def big(name, phrases, kind=models.DecoderOptions, **changes):
  sizes = {k: changes.pop(k) for k in ('batch_size', 'seq_len') if k in changes}
  model = {**TINY, **changes}
  return Case(name, lambda folder: check_run(kind(**model), **sizes), phrases)


HUGE = 2 * 10**9  # options are integers of 32 bits
MOE = models.DecoderOptions(**TINY).moe
FFN = models.DecoderOptions(**TINY).ffn
PARAMETERS = ('the parameters of', 'at least', 'memory together')
CASES += [
  big('layers', PARAMETERS, num_layers=HUGE),
  big('ten million layers', PARAMETERS, num_layers=10**7, width=1024),
  big('width', PARAMETERS, width=HUGE),
  big('vocabulary', PARAMETERS, vocab_size=HUGE, width=10**6),
  big(
    'hidden', PARAMETERS, width=10**6, ffn=dataclasses.replace(FFN, hidden=HUGE)
  ),
  big('experts', PARAMETERS, moe=dataclasses.replace(MOE, num_experts=10**9)),
  big(
    'rows',
    ('batch_size=2000000000 of 1000000 tokens',),
    batch_size=HUGE,
    seq_len=10**6,
  ),
  big('length', ('of 2000000000 tokens',), seq_len=HUGE, batch_size=10**6),
  big(
    'logits',
    ('logits', 'vocab_size=10000000'),
    vocab_size=10**7,
    batch_size=10**6,
  ),
  big(
    'lstm layers', PARAMETERS, models.LstmLmOptions, num_layers=HUGE, width=64
  ),
  big('lstm width', PARAMETERS, models.LstmLmOptions, width=HUGE),
  Case(
    'room',
    lambda folder: check_room([('it', 10**18)]),
    ('it: at least 1e+06 TB', 'devices of kind'),
  ),
  Case(
    'initial parameters',
    lambda folder: models.init_params(
      models.DecoderOptions(**{**TINY, 'width': 10**6}).build(),
      jax.random.key(0),
    ),
    ('the variables of Decoder', 'at least'),
  ),
]


@pytest.mark.parametrize('case', CASES, ids=Case.id)
def test_refused(case, tmp_path):
  check(case, tmp_path)
