"""Measures what the gates of a trained deep mixture of experts depend on."""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from experiments.gates_2013 import digits, information
from experiments.gates_2013.deep_moe import DeepMoe
from experiments.gates_2013.training import Training
from moe_jax.routing.stats import load_summary

# Largest number of images of the validation split that are measured.
IMAGES = 400


def measure(options: Training, params: Any) -> dict[str, Any]:
  """Measures the error and the gates on validation images at every place.

  Returns:
    Numbers by name, and for pictures the mean gates `layer_<i>/by_place`
    [E, rows, columns] and `layer_<i>/by_class` [E, classes].
  """
  name = options.data.name
  images, labels = digits.load(name)[1]
  indices = np.arange(0, len(labels), -(-len(labels) // IMAGES))
  images, labels = images[indices], labels[indices]
  side = digits.CANVAS[name] - images.shape[1] + 1
  places = np.stack(np.mgrid[:side, :side], -1).reshape(-1, 2)
  examples = digits.placed(
    np.repeat(images, len(places), axis=0),
    np.tile(places, (len(images), 1)),
    digits.CANVAS[name],
  )
  logits, gates = jax.device_get(_compiled(options.model)(params, examples))
  wrong = logits.argmax(-1) != np.repeat(labels, len(places))
  numbers: dict[str, Any] = {'test_error': 100 * float(wrong.mean())}
  for i, layer in enumerate(gates, 1):
    layer = layer.reshape(len(images), len(places), -1).astype(np.float64)
    of_layer = _of_layer(layer, labels)
    mean = layer.mean(0).T.reshape(-1, side, side)
    of_layer['by_place'] = mean.round(5).tolist()
    of_class = information.by_class(layer, labels).T
    of_layer['by_class'] = of_class.round(5).tolist()
    numbers |= {f'layer_{i}/{key}': value for key, value in of_layer.items()}
  return numbers


@functools.lru_cache(maxsize=4)
def _compiled(model: DeepMoe):
  return jax.jit(lambda params, x: model.apply({'params': params}, x))


def _of_layer(
  gates: Float[np.ndarray, 'N P E'], labels: Int[np.ndarray, ' N']
) -> dict[str, Any]:
  about_place = information.about_place(gates)
  digit = information.about_class(gates, labels)
  importance = gates.mean((0, 1))
  return {
    'place': about_place.excess,
    'class': digit.excess,
    'place_less_class': about_place.excess - digit.excess,
    'place_by_chance': about_place.by_chance,
    'class_by_chance': digit.by_chance,
    'importance_cv': load_summary(importance)['load_cv'],
    'in_use': int((importance > information.USED).sum()),
  }
