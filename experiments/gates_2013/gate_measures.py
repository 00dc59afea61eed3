"""Measures what the gates of a trained deep mixture of experts depend on.

Not here: the question (`experiments/eigen_2013.py`), how information is
estimated (`study/gate_information.py`), and pictures (`gate_pictures.py`).
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from experiments.study import gate_information
from moe_jax.data.sources.digits import placed
from moe_jax.models import Model
from moe_jax.routing.load_summary import load_summary
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Largest number of images of the validation split that are measured.
IMAGES = 400


def measure(run: Run, state: TrainState) -> dict[str, Any]:
  """Measures the error and the gates on validation images at every place.

  Returns:
    Numbers by name, and for pictures the mean gates `layer_<i>/by_place`
    [E, rows, columns] and `layer_<i>/by_class` [E, classes].
  """
  source = run.options.data.source.classes()
  images, labels = source.examples('validation')
  indices = np.arange(0, len(labels), -(-len(labels) // IMAGES))
  images, labels = images[indices], labels[indices]
  rows, columns = source.room + 1
  places = np.stack(np.mgrid[:rows, :columns], -1).reshape(-1, 2)
  examples = placed(
    np.repeat(images, len(places), axis=0),
    np.tile(places, (len(images), 1)),
    source.canvas,
  )
  apply = _compiled(run.model)
  logits, gates = jax.device_get(apply(state.variables, examples))
  wrong = logits.argmax(-1) != np.repeat(labels, len(places))
  numbers: dict[str, Any] = {'test_error': 100 * float(wrong.mean())}
  for i, layer in enumerate(gates, 1):
    layer = layer.reshape(len(images), len(places), -1).astype(np.float64)
    of_layer = _of_layer(layer, labels)
    mean = layer.mean(0).T.reshape(-1, rows, columns)
    of_layer['by_place'] = mean.round(5).tolist()
    of_class = gate_information.by_class(layer, labels).T
    of_layer['by_class'] = of_class.round(5).tolist()
    numbers |= {f'layer_{i}/{key}': value for key, value in of_layer.items()}
  return numbers


@functools.lru_cache(maxsize=4)
def _compiled(model: Model):
  @jax.jit
  def apply(variables, features):
    (logits, _), collections = model.apply(
      variables, features, mutable=['intermediates']
    )
    layers = collections['intermediates']
    gates = [layers[f'layer_{i}']['gates'][0] for i in range(model.num_layers)]
    return logits[:, 0], gates

  return apply


def _of_layer(
  gates: Float[np.ndarray, 'N P E'], labels: Int[np.ndarray, ' N']
) -> dict[str, Any]:
  about_place = gate_information.about_place(gates)
  digit = gate_information.about_class(gates, labels)
  importance = gates.mean((0, 1))
  return {
    'place': about_place.excess,
    'class': digit.excess,
    'place_less_class': about_place.excess - digit.excess,
    'place_by_chance': about_place.by_chance,
    'class_by_chance': digit.by_chance,
    'importance_cv': load_summary(importance)['load_cv'],
    'in_use': int((importance > gate_information.USED).sum()),
  }
