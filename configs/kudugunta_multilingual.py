"""A translation model from which the part of one language can be extracted.

Kudugunta et al. 2021 (https://arxiv.org/abs/2110.03742) route tokens in the
encoder and tasks in the decoder of a translation model: all tokens of a target
language have the same two experts of a layer. So a language's part of the
decoder is a dense model, which is extracted as it is. As in the paper,
tokens choose 2 of 32 experts in every other layer and languages are drawn at
temperature 5. The data and the size of the layers are those of
`shazeer_multilingual.py` (`pip install django`): each language is a source of
data, and a task. The data have translations from English alone, so that a
target language and a pair of languages are the same.

    python -m moe_jax.main --config=moe_jax:kudugunta_multilingual \
      --workdir=runs/multilingual
    python -m moe_jax.generate --workdir=runs/multilingual --task=de \
      --prompt='de: Please enter a date'
    python -m moe_jax.compression extract --run=runs/multilingual --task=de \
      --output=runs/german
"""

from moe_jax.configs import base, shazeer_multilingual
from moe_jax.data import GettextSource
from moe_jax.evaluation import SourceLosses

LANGUAGES = tuple(shazeer_multilingual.LANGUAGES.split(','))


def get_config(arg: str = ''):
  config = shazeer_multilingual.get_config()
  config.data.source.django_gettext.languages = ''
  config.data.source.kind = 'python_stdlib'
  mixture = config.data.mixture
  for language in LANGUAGES[:2] if arg == 'runlocal' else LANGUAGES:
    source = GettextSource(languages=language)
    mixture.sources[language] = base.source(source)
  mixture.rule = 'temperature'
  mixture.temperature = 5.0
  moe = config.model.moe
  moe.num_selected = 2
  moe.expert.hidden = 256
  moe.router = base.get_config().model.moe.router
  moe.router.kind = 'task'
  moe.router.task.gates = 'renormalized'
  config.model.encoder.overrides = {
    'moe': {
      'router': {
        'kind': 'token_choice', 'token_choice': {'gates': 'renormalized'}
      }
    }
  }  # fmt: skip
  config.sample.task = 'de'
  config.evals.losses = base.entry(SourceLosses, every_steps=500, num_batches=4)
  return base.finish(config, arg)
