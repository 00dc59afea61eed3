"""Measures translations of a trained run, and the models extracted from it."""

import numpy as np

from experiments.benchmarks import timing
from experiments.study import served
from moe_jax.compression import extract
from moe_jax.compression.whole_run import bytes_in_memory
from moe_jax.errors import InputError
from moe_jax.evaluation import GenerateEvaluation
from moe_jax.models import check_generates
from moe_jax.training.evaluate import Losses, Setting
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

_SCORED = 64  # number of translations that are scored


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Scores of generated translations, and what extraction changes.

  Returns:
    Numbers by name; those of a part are left out of models without it:
    - scores/chrf, scores/bleu: of generated translations, in percent.
    - whole/bytes: bytes of the decoder's parameters.
    - extracted/loss, extracted/bytes: means over languages of each language's
      extracted model.
    - extracted/speed: tokens generated a second, as a ratio to the whole
      model's, the median of interleaved rounds.
  """
  variables = run.programs.variables(state)
  numbers = {'whole/bytes': bytes_in_memory(variables['params']['decoder'])}
  try:
    check_generates(run.model)
  except InputError:  # a decoder that routes by sentence
    return numbers
  setting = Setting(
    name='scores',
    model=run.model,
    dataset=run.dataset,
    data=run.options.data,
    workdir=run.workdir,
    put=run.programs.put,
  )
  scores = GenerateEvaluation(
    num_examples=_SCORED, num_tokens=served.TOKENS, metrics='chrf,bleu'
  ).measure(setting)
  row = scores(variables, int(state.step))
  numbers |= {f'scores/{name}': row[name] for name in ('chrf', 'bleu')}
  if run.options.model.routes_by_task:
    numbers |= _extraction(setting, run.options, variables)
  return numbers


def _extraction(setting: Setting, options, variables) -> dict[str, float]:
  losses, sizes, model = [], [], None
  for number, language in enumerate(options.data.tasks):
    small = extract.extract(options.model, variables['params'], number)
    model = model or small.options.build(options.sharding.rules)
    rows = setting.dataset.parts[language].splits['validation']
    small_variables = {'params': small.params}
    losses_of = Losses(model, 0, rows, setting.put)
    losses.append(float(losses_of(small_variables, 0)['loss']))
    sizes.append(bytes_in_memory(small.params['decoder']))
  return {
    'extracted/loss': float(np.mean(losses)),
    'extracted/bytes': float(np.mean(sizes)),
    'extracted/speed': _speed(
      setting, variables, model, small_variables, number
    ),
  }


def _speed(
  setting: Setting, variables, model, small_variables, task: int
) -> float:
  """Tokens a second of one task's extracted model over the whole model's."""
  prompts = served.prompts_of(setting.dataset.splits['validation'])
  inputs = setting.dataset.tokenizer, prompts
  times = timing.interleave(
    {
      'whole': served.generating(
        setting.model, variables, *inputs, [task] * len(prompts)
      ),
      'own': served.generating(model, small_variables, *inputs),
    },
    seconds=served.SECONDS,
  )
  return timing.ratio(times['whole'], times['own']).median
