"""Generation refuses prompts, ids and numbers that it cannot use."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import generation, models
from moe_jax.generation.sampling import keep_top_k, keep_top_p
from tests.bad_inputs.cases import Case, check

V = 11
TINY = {'vocab_size': V, 'width': 8, 'num_layers': 2}
NAN, INF = float('nan'), float('inf')
PROMPT = [[1, 2], [3]]
LOGITS = jnp.zeros((2, V))


@functools.cache
def prepared(kind=models.DecoderOptions):
  """A tiny model with parameters of zeros, prepared once."""
  model = kind(**TINY).build()
  shapes = nn.meta.unbox(models.abstract_params(model))
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  return generation.prepare(model, {'params': params})


def generate(prompt=PROMPT, kind=models.DecoderOptions, **options):
  return generation.generate(
    *prepared(kind), prompt, **{'num_tokens': 4, **options}
  )


def beams(prompt=PROMPT, **options):
  options = {'num_tokens': 4, 'num_beams': 2, **options}
  return generation.beam_search(*prepared(), prompt, **options)


def case(name, f, *phrases, **options):
  return Case(name, lambda folder: f(**options), phrases)


CASES = [
  case(f'{name}={value!r}', generate, *phrases, **{name: value, **more})
  for name, more, values in (
    (
      'temperature',
      {},
      {
        -1: ('temperature=-1', 'negative'),
        NAN: ('temperature=nan', 'finite'),
        INF: ('temperature=inf', 'finite'),
        -INF: ('temperature=-inf', 'finite'),
        True: ('temperature=True', 'number'),
        '1': ("temperature='1'", 'number'),
        None: ('temperature=None', 'number'),
      },
    ),
    (
      'top_k',
      {'temperature': 1.0},
      {
        -3: ('top_k=-3', 'at least 0'),
        1.5: ('top_k=1.5', 'integer'),
        NAN: ('top_k=nan', 'integer'),
        True: ('top_k=True', 'integer'),
        '2': ("top_k='2'", 'integer'),
        None: ('top_k=None', 'integer'),
      },
    ),
    (
      'top_p',
      {'temperature': 1.0},
      {
        0: ('top_p=0', '(0, 1]'),
        -0.5: ('top_p=-0.5', '(0, 1]'),
        1.5: ('top_p=1.5', '(0, 1]'),
        NAN: ('top_p=nan', 'finite'),
        INF: ('top_p=inf', 'finite'),
        '1': ("top_p='1'", 'number'),
      },
    ),
    (
      'num_tokens',
      {},
      {
        0: ('num_tokens=0',),
        -4: ('num_tokens=-4', 'at least'),
        2.5: ('num_tokens=2.5', 'integer'),
        NAN: ('num_tokens=nan', 'integer'),
        True: ('num_tokens=True', 'integer'),
        None: ('num_tokens=None', 'integer'),
        2 * 10**9: ('tokens', 'memory together'),
        10**30: ('num_tokens=1', 'at most'),
      },
    ),
    (
      'seed',
      {},
      {
        -1: ('seed=-1', 'at least 0'),
        2**32: ('seed=4294967296', 'at most'),
        1.5: ('seed=1.5', 'integer'),
        NAN: ('seed=nan', 'integer'),
        (1, 2, 3): ('3 seeds for 2 prompts',),
        (1, -2): ('seed=-2', 'at least 0'),
      },
    ),
    (
      'stop_ids',
      {},
      {
        (-1,): ('stop_ids', 'token -1', 'vocab_size=11'),
        (V,): ('stop_ids', 'token 11', 'vocab_size=11'),
        (1.5,): ('stop_ids', '1.5', 'integers'),
        (NAN,): ('stop_ids', 'nan', 'integers'),
        ('a',): ('stop_ids', "'a'", 'integers'),
        'eos': ("stop_ids='eos'", 'text'),
        3: ('stop_ids', '()'),
      },
    ),
    (
      'forced_ids',
      {},
      {
        (-1,): ('forced_ids', 'token -1'),
        (V,): ('forced_ids', 'token 11', 'vocab_size=11'),
        (0.5,): ('forced_ids', '0.5', 'integers'),
        (1, 2, 3, 4): ('num_tokens=4', '4 forced_ids'),
      },
    ),
    (
      'pad_id',
      {},
      {
        0.5: ('pad_id=0.5', 'integer'),
        None: ('pad_id=None', 'integer'),
        2**40: ('pad_id=1099511627776', 'at most'),
      },
    ),
    (
      'num_beams',
      {},
      {
        0: ('num_beams=0',),
        -1: ('num_beams=-1',),
        1.5: ('num_beams=1.5', 'integer'),
        True: ('num_beams=True', 'integer'),
      },
    ),
    (
      'num_beams',
      {'temperature': 0.5},
      {2: ('num_beams=2 with temperature=0.5', 'one of the two')},
    ),
    ('num_beams', {'on_token': print}, {3: ('num_beams=3 with on_token',)}),
    (
      'length_penalty',
      {},
      {
        NAN: ('length_penalty=nan', 'finite'),
        INF: ('length_penalty=inf', 'finite'),
        None: ('length_penalty=None', 'number'),
      },
    ),
    (
      'start_id',
      {},
      {1: ('start_id=1', 'decoder-only'), 1.5: ('start_id=1.5', 'integer')},
    ),
  )
  for value, phrases in values.items()
]
CASES += [
  case(f'prompt-{name}', generate, *phrases, prompt=prompt)
  for name, prompt, phrases in (
    ('no rows', [], ('no rows',)),
    ('an empty row', [[1], []], ('prompt 1 of 2', '(0,)')),
    ('negative', [[1, -2]], ('token -2', 'vocab_size=11')),
    ('unknown', [[1, V]], ('token 11', 'vocab_size=11')),
    ('huge', [[4 * 10**9]], ('token 4000000000', 'vocab_size=11')),
    ('above 64 bits', [[10**30]], ('prompt 0 of 1', 'integers')),
    ('halves', [[1.5, 2.0]], ('prompt 0 of 1', '1.5', 'integers')),
    ('nan', [[NAN]], ('nan', 'integers')),
    ('infinity', [[INF, 1]], ('inf', 'integers')),
    ('booleans', [[True, False]], ('True', 'integers')),
    ('text', 'a prompt', ("'a prompt'", 'token ids')),
    ('texts', ['ab', 'c'], ("'ab'", 'token ids')),
    ('bytes', b'ab', ("b'ab'", 'token ids')),
    ('a number', 3, ('prompt=3', 'token ids')),
    ('none', None, ('prompt=None', 'token ids')),
    (
      'an array of rank 3',
      np.ones((1, 2, 3), int),
      ('(2, 3)', 'a list of ids'),
    ),
    ('nested', [[[1], [2, 3]]], ('prompt 0 of 1', 'a list of ids')),
  )
]
CASES += [
  case(
    'both-no start', generate, 'start_id', kind=models.EncoderDecoderOptions
  ),
  case(
    'both-start beyond',
    generate,
    *('start_id=11', 'at most 10'),
    kind=models.EncoderDecoderOptions,
    start_id=V,
  ),
  case('beams-none', beams, 'num_beams=0', num_beams=0),
  case('beams-return', beams, 'num_beams=2 and num_return=3', num_return=3),
  case('beams-returned half', beams, 'num_return=0.5', num_return=0.5),
  case('beams-penalty', beams, 'length_penalty=nan', length_penalty=NAN),
  case('beams-stop', beams, 'stop_ids', 'token 99', stop_ids=[99]),
  case('beams-prompt', beams, 'token -1', prompt=[[-1]]),
  case(
    'beams-drawn',
    generate,
    'num_beams=2',
    'temperature',
    num_beams=2,
    temperature=1.0,
  ),
  case('greedy-top_k', generate, 'top_k=3', 'temperature above 0', top_k=3),
]
CASES += [
  Case(
    f'prepare-{name}',
    lambda folder, a=arguments: generation.prepare(*a),
    phrases,
  )
  for name, arguments, phrases in (
    ('a dict', ({}, {'params': {}}), ('model is a dict', 'Model')),
    ('options', (models.DecoderOptions(), {}), ('DecoderOptions', 'Model')),
    ('a module', (nn.Dense(3), {'params': {}}), ('model is a Dense', 'Model')),
    ('none', (None, {}), ('NoneType', 'Model')),
    ('no params', (prepared()[0], {'par': 1}), ("'params'", "['par']")),
    ('no variables', (prepared()[0], None), ("'params'", 'None')),
  )
]  # fmt: skip
CASES += [
  Case(name, lambda folder, f=f, a=arguments: f(*a), phrases)
  for name, f, arguments, phrases in (
    ('keep k=0', keep_top_k, (LOGITS, 0), ('top_k=0', 'at least 1')),
    ('keep k=half', keep_top_k, (LOGITS, 0.5), ('k=0.5', 'integer')),
    ('keep k of a row', keep_top_k, (LOGITS[0], 2), ('(11,)', '[B, V]')),
    ('keep p of a row', keep_top_p, (LOGITS[0], 0.5), ('(11,)', '[B, V]')),
  )
]


@pytest.fixture(autouse=True)
def _without_the_hook(monkeypatch):
  """Turns off the types that tests alone check, as a user has them."""
  monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)


@pytest.mark.parametrize('case', CASES, ids=Case.id)
def test_refused(case, tmp_path):
  check(case, tmp_path)
