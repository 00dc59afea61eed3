"""Measures of what the gates of a trained deep mixture of experts depend on.

They are mutual information of gates and a label, in nats. An example draws an
expert e with its gates as probabilities. For labels c of probability p(c),

    p(e | c) = mean of the gates of the examples of c
    I(e; c)  = H(sum_c p(c) p(e | c)) - sum_c p(c) H(p(e | c))

The information is 0 where all labels have the same mean gates, and at most
ln E. Means over few examples deviate from their expectation, so that the
estimate is above 0 even where gates do not depend on the label. This bias is
estimated with the same gates and shuffled labels. The samples are images, not
pairs of image and place, since the gates of one image at its places are
correlated.

Pictures show the mean gates by place and by class.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from experiments.gates_2013 import digits
from experiments.gates_2013.deep_moe import DeepMoe
from experiments.study.parts import Result, Results
from moe_jax.routing.stats import load_summary

# Number of shuffles of the labels over which the bias is averaged.
SHUFFLES = 20
# Share of all gates above which an expert counts as in use.
USED = 0.01


class Information(NamedTuple):
  """Mutual information of gates and a label, in nats.

  Attributes:
    measured: The estimate, without correction of its bias.
    by_chance: The mean estimate for shuffled labels, which is its bias.
  """

  measured: float
  by_chance: float

  @property
  def excess(self) -> float:
    """The estimate less its bias; it may be below 0."""
    return self.measured - self.by_chance


def entropy(p: Float[np.ndarray, '... E']) -> np.ndarray:
  """The entropy over the last axis, in nats; 0 log 0 is 0."""
  return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


def mutual_information(
  conditional: Float[np.ndarray, 'C E'], weight: Float[np.ndarray, ' C']
) -> float:
  """The mutual information I(e; c), from p(e | c) and p(c)."""
  mean = weight @ conditional
  return float(entropy(mean) - weight @ entropy(conditional))


def by_class(
  gates: Float[np.ndarray, 'N P E'], labels: Int[np.ndarray, ' N']
) -> np.ndarray:
  """Mean gates p(e | class), averaged over all places; [classes, E]."""
  mean = gates.mean(1)
  return np.stack([mean[labels == c].mean(0) for c in np.unique(labels)])


def about_class(
  gates: Float[np.ndarray, 'N P E'],
  labels: Int[np.ndarray, ' N'],
  seed: int = 0,
) -> Information:
  """Information of the gates of N images at P places about the class."""
  _, counts = np.unique(labels, return_counts=True)
  weight, rng = counts / len(labels), np.random.default_rng(seed)

  def class_information(labels):
    return mutual_information(by_class(gates, labels), weight)

  chance = [class_information(rng.permutation(labels)) for _ in range(SHUFFLES)]
  return Information(class_information(labels), float(np.mean(chance)))


def about_place(gates: Float[np.ndarray, 'N P E']) -> Information:
  """Information of the gates of N images, at all P places, about the place."""
  N, P, _ = gates.shape
  weight, rng = np.full(P, 1 / P), np.random.default_rng(0)
  chance = []
  for _ in range(SHUFFLES):
    order = rng.permuted(np.tile(np.arange(P), (N, 1)), axis=1)
    shuffled = np.take_along_axis(gates, order[..., None], axis=1)
    chance.append(mutual_information(shuffled.mean(0), weight))
  measured = mutual_information(gates.mean(0), weight)
  return Information(measured, float(np.mean(chance)))


LAYERS = (1, 2)


def pictures(results: Results, folder: pathlib.Path) -> None:
  """Writes the picture of each arm's first seed to `gates_<arm>.png`."""
  for arm, runs in results.items():
    name = arm.replace(', ', '_').replace(' ', '_')
    picture(runs[0], arm).savefig(folder / f'gates_{name}.png', dpi=110)


def picture(result: Result, title: str) -> Figure:
  """Draws the mean gates of one run, a row of panels for each layer.

  A row has a panel for each expert, its mean gate by place, and at the end one
  of all experts, their mean gates by class. Layers have equally many experts.
  """
  layers = [i for i in LAYERS if f'layer_{i}/by_place' in result]
  E = len(result['layer_1/by_place'])
  size, widths = (1.5 * E + 3.6, 1.7 * len(layers) + 0.6), [1] * E + [2]
  figure = Figure(figsize=size, layout='constrained')
  shape = dict(nrows=len(layers), ncols=E + 1, width_ratios=widths)
  axes = figure.subplots(**shape, squeeze=False)
  scale = dict(vmin=0.0, vmax=1.0, cmap='viridis')
  for line, i in zip(axes, layers, strict=True):
    for e, gate in enumerate(result[f'layer_{i}/by_place']):
      line[e].imshow(gate, **scale)
      line[e].set_title(f'layer {i}, expert {e}', fontsize=8)
      line[e].set(xticks=[], yticks=[])
    of_class = np.array(result[f'layer_{i}/by_class'])
    image = line[-1].imshow(of_class, aspect='auto', **scale)
    line[-1].set_title('experts by class', fontsize=8)
    line[-1].set(xticks=range(of_class.shape[1]), yticks=range(len(of_class)))
    line[-1].tick_params(labelsize=7)
  figure.colorbar(image, ax=figure.axes, label='mean gate')
  figure.suptitle(f'{title}: mean gates by place, and by class', fontsize=10)
  return figure


# Largest number of images of the validation split that are measured.
IMAGES = 400


def measure(name: str, model: DeepMoe, params: Any) -> dict[str, Any]:
  """Measures the error and the gates on validation images at every place.

  Args:
    name: Name of the set of images.
    model: The model.
    params: Its trained parameters.

  Returns:
    Numbers by name, and for pictures the mean gates `layer_<i>/by_place`
    [E, rows, columns] and `layer_<i>/by_class` [E, classes].
  """
  images, labels = digits.load(name)[1]
  indices = np.arange(0, len(labels), -(-len(labels) // IMAGES))
  images, labels = images[indices], labels[indices]
  side = digits.CANVAS[name] - images.shape[1] + 1
  places = np.stack(np.mgrid[:side, :side], -1).reshape(-1, 2)
  repeated, offsets = np.repeat(images, len(places), 0), [places] * len(images)
  canvas = digits.CANVAS[name]
  examples = digits.placed(repeated, np.concatenate(offsets), canvas)
  logits, all_gates = jax.device_get(_applied(model, params, examples))
  wrong = logits.argmax(-1) != np.repeat(labels, len(places))
  numbers: dict[str, Any] = {'test_error': 100 * float(wrong.mean())}
  for i, gates in enumerate(all_gates, 1):
    gates = gates.reshape(len(images), len(places), -1).astype(np.float64)
    place, digit = about_place(gates), about_class(gates, labels)
    importance = gates.mean((0, 1))
    by_place = gates.mean(0).T.reshape(-1, side, side)
    of_layer = {
      'place': place.excess,
      'class': digit.excess,
      'place_less_class': place.excess - digit.excess,
      'place_by_chance': place.by_chance,
      'class_by_chance': digit.by_chance,
      'importance_cv': load_summary(importance)['load_cv'],
      'in_use': int((importance > USED).sum()),
      'by_class': by_class(gates, labels).T.round(5).tolist(),
      'by_place': by_place.round(5).tolist(),
    }
    numbers |= {f'layer_{i}/{key}': value for key, value in of_layer.items()}
  return numbers


@functools.partial(jax.jit, static_argnames='model')
def _applied(model: DeepMoe, params: Any, x: np.ndarray):
  return model.apply({'params': params}, x)
