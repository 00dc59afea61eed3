"""Pictures of mean gates by place and by class."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from experiments.study.parts import Result, Results

LAYERS = (1, 2)


def pictures(results: Results, folder: pathlib.Path) -> None:
  """Writes the picture of each arm's first seed to `gates_<arm>.png`."""
  for arm, runs in results.items():
    name = arm.replace(', ', '_').replace(' ', '_')
    picture(runs[0], arm).savefig(folder / f'gates_{name}.png', dpi=110)


def picture(result: Result, title: str) -> Figure:
  """Draws the mean gates of one run, a row of panels for each layer.

  A row has a panel for each expert, its mean gate by place, and at the end one
  of all experts, their mean gates by class.
  """
  layers = [i for i in LAYERS if f'layer_{i}/by_place' in result]
  most = max(len(result[f'layer_{i}/by_place']) for i in layers)
  figure = Figure(
    figsize=(1.5 * most + 3.6, 1.7 * len(layers) + 0.6), layout='constrained'
  )
  axes = figure.subplots(
    len(layers), most + 1, squeeze=False, width_ratios=[1] * most + [2]
  )
  scale = dict(vmin=0.0, vmax=1.0, cmap='viridis')
  for line, i in zip(axes, layers, strict=True):
    for e, gate in enumerate(result[f'layer_{i}/by_place']):
      line[e].imshow(gate, **scale)
      line[e].set_title(f'layer {i}, expert {e}', fontsize=8)
      line[e].set_xticks([])
      line[e].set_yticks([])
    for empty in line[len(result[f'layer_{i}/by_place']) : -1]:
      empty.remove()
    of_class = np.array(result[f'layer_{i}/by_class'])
    image = line[-1].imshow(of_class, aspect='auto', **scale)
    line[-1].set_title('experts by class', fontsize=8)
    line[-1].set_xticks(range(of_class.shape[1]))
    line[-1].set_yticks(range(of_class.shape[0]))
    line[-1].tick_params(labelsize=7)
  figure.colorbar(image, ax=figure.axes, label='mean gate')
  figure.suptitle(f'{title}: mean gates by place, and by class', fontsize=10)
  return figure
