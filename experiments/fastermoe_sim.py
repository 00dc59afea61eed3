"""What would FasterMoE's parts save on a cluster? All figures are SIMULATED.

    python -m experiments.fastermoe_sim --counts=skewed --counts=uniform
    python -m moe_jax.main --config=configs/tiny_switch.py \\
      --workdir=runs/tiny_16 --config.model.moe.num_experts=16 \\
      --config.model.moe.router.token_choice.balance_weight=0.0 \\
      --config.total_steps=300 --config.trace.every_steps=10 \\
      --config.trace.logits=True --config.checkpoint.every_steps=300
    python -m experiments.fastermoe_sim --trace=runs/tiny_16/trace

Replays which experts tokens chose, from traces of real runs or drawn, through
the cost model of FasterMoE (He et al., PPoPP 2022) on the paper's two clusters
and a described slice of TPUs: synchronous, with shadowed experts, with the
smart schedule, with both, and, where logits were recorded, with the
topology-aware gate. Writes a table and figures to `--output`, with the command
that made them. Nothing is measured.

The layer has the widths that FastMoE's shadowing policy assumes, M=2048 and
F=4096, unless `--config` names a model. A small run has few tokens: each of its
rows stands for as many as give a device 4,096 tokens.
"""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.faster_moe import clusters, expert_counts, simulate
from experiments.faster_moe.clusters import CLUSTERS, Cluster
from experiments.faster_moe.expert_counts import Counts
from experiments.faster_moe.simulate import ARMS, SHADOWED, Simulated
from experiments.study import claims
from experiments.study.tables import markdown_table
from moe_jax import cli, run_config
from moe_jax.errors import InputError
from moe_jax.parallel import cost_model, shadowing
from moe_jax.parallel.cost_model import Sizes

# Tokens of a device that are drawn.
DRAWN = 1024
_STYLES = {
  name: {'color': f'C{i}', 'marker': marker}
  for i, (name, marker) in enumerate(zip(ARMS, 'os^vD<>P', strict=True))
}
ABOUT = """# FasterMoE, SIMULATED

Nothing here was measured on a cluster: seconds are those of a cost model on
described machines, of the experts of a layer in a training step, without
attention, optimizer and the rest of a model. The paper's speed-ups are of whole
training iterations. n_max is the number of rows of the busiest device, r the
number of shadowed experts (1 where there is none), F the hidden width of an
expert (3/2 of it with three kernels); where n_max > r F, parameters are less
traffic than rows. The overlap bound is max(communication, computation) of a
step.
"""


class Case(NamedTuple):
  """Counts on a cluster, and the training steps simulated for them.

  Attributes:
    source: Name of the trace or of the drawn counts.
    cluster: The machine.
    sizes: The sizes of the simulated experts.
    counts: The rows of each device that choose each expert.
    arms: Simulated training steps, by name of the arm.
  """

  source: str
  cluster: Cluster
  sizes: Sizes
  counts: Counts
  arms: Mapping[str, Simulated]

  @property
  def title(self) -> str:
    """The choices and the machine, in words."""
    return f'{self.source} on {self.cluster.name}'


def cases(options: argparse.Namespace) -> tuple[list[Case], list[str]]:
  """Simulates all sources on all machines.

  Returns:
    The cases, and remarks on traces and on what cannot be simulated.
  """
  layer, steps = sizes_of(options), options.steps
  simulated: list[Case] = []
  remarks = [expert_counts.about(folder) for folder in options.trace]
  for source in (*options.trace, *options.counts):
    for name in options.topology:
      cluster = CLUSTERS[name]
      sizes = layer._replace(bytes_per_element=cluster.bytes_per_element)
      W = cluster.num_devices
      try:
        if source in expert_counts.DRAWN:
          chosen = expert_counts.drawn(source, W, W * DRAWN, steps)
        else:
          chosen = expert_counts.recorded(source, steps)
        counts = expert_counts.counts_of(
          chosen,
          cluster,
          tokens_per_device=clusters.TOKENS,
          outgoing=cluster.outgoing,
        )
      except expert_counts.DoesNotDivide as problem:
        remarks.append(f'left out: {source} on {name}, as {problem}')
        continue
      arms = simulate.simulate(cluster, counts, sizes)
      simulated.append(Case(source, cluster, sizes, counts, arms))
  return simulated, remarks


def table(case: Case) -> str:
  """The table of all arms of a case, in Markdown."""
  F = shadowing.least_rows(1, case.sizes)
  lines = []
  for name, arm in case.arms.items():
    numbers = simulate.numbers(case.arms[simulate.SYNCHRONOUS], arm)
    number = np.maximum(arm.shadowed.sum(-1), 1)
    pays = arm.largest > shadowing.least_rows(number, case.sizes)
    shadowed = f'{100 * numbers["shadowed"]:.1f}' if ARMS[name].shadows else ''
    paper = ''
    if address := simulate.published(case.cluster, name):
      paper = 'up to ' * (name == SHADOWED) + claims.find(address).cite()
    lines.append(
      {
        'SIMULATED': name,
        'ms a layer': f'{1e3 * arm.seconds.mean():.2f}',
        'speed-up': f'{numbers["speed_up"]:.2f}',
        'best layer and step': f'{numbers["best"]:.2f}',
        'paper': paper,
        'overlap bound reached, %': f'{100 * numbers["reached"]:.0f}',
        'experts shadowed, %': shadowed,
        'n_max': f'{arm.largest.mean():,.0f}',
        'r F': f'{number.mean():.2f} x {F:,.0f} = {number.mean() * F:,.0f}',
        'n_max > r F, % of cases': f'{100 * pays.mean():.0f}',
      }
    )
  return markdown_table(lines)


def heading(case: Case) -> str:
  """The size of a case in words."""
  counts, sizes = case.counts, case.sizes
  R, E, W = counts.counts.shape
  rows = counts.counts.sum() / (R * W)
  gate = 'No gate, for lack of nodes or of recorded logits.'
  if counts.gated is not None:
    gate = (
      f"The gate lets {100 * counts.outgoing:.1f} % of a device's tokens leave "
      "the node (by the paper's formula, rounded down to whole tokens)."
    )
  return (
    f'SIMULATED, {case.title}: {E} experts on {W} devices, batches times '
    f'layers: {R}, {rows:,.0f} rows a device (each counted row stands for '
    f'{counts.rows:g}); M={sizes.M:,}, F={sizes.F:,}, {sizes.kernels} kernels, '
    f'{sizes.bytes_per_element} bytes an element. {gate}'
  )


def page(cases: Sequence[Case], command: str, remarks: Sequence[str]) -> str:
  """The page of all cases, in Markdown.

  Args:
    cases: The cases.
    command: The command that made it.
    remarks: Sentences about the whole page.
  """
  sources = dict.fromkeys(case.cluster.sources for case in cases)
  lines = [ABOUT, f'Made by `{command}`.', '']
  lines += [f'- {text}' for text in (*sources, *remarks)]
  for case in cases:
    lines += ['', f'## {case.title}', '', heading(case), '', table(case)]
  return '\n'.join([*lines, ''])


def roofline(cases: Sequence[Case], path: pathlib.Path) -> None:
  """Draws Figure 4 of FasterMoE, the roofline of a layer, for each machine.

  Crosses are synchronous layers whose devices have equally many rows, with an
  eighth to 64 times the hidden width: they lie on the semi-ideal curve. Other
  points are those of each machine's first case.
  """
  first: dict[str, Case] = {}
  for case in cases:
    first.setdefault(case.cluster.name, case)
  figure = Figure(figsize=(1 + 4.2 * len(first), 4.8), layout='constrained')
  axes = figure.subplots(1, len(first), squeeze=False)[0]
  handles = {}
  for ax, case in zip(axes, first.values(), strict=True):
    x, y = simulate.even_points(case.cluster, case.sizes)
    line = np.geomspace(x.min() / 2, max(x.max(), 8), 200)
    peak = case.cluster.topology.flops_per_second
    for curve, style, label in (
      (cost_model.ideal, 'k-', 'ideal'),
      (cost_model.semi_ideal, 'k--', 'semi-ideal'),
    ):
      ax.plot(line, curve(peak, line) / 1e12, style, lw=1, label=label)
    label = 'synchronous, even rows, F/8 to 64 F'
    ax.plot(x, y / 1e12, 'kx', ms=5, label=label)
    for name, arm in case.arms.items():
      style = _STYLES[name] | dict(ls='', ms=3, alpha=0.4, label=name)
      ax.plot(arm.ratio, arm.flops / 1e12, **style)
    ax.set(xscale='log', yscale='log')
    ax.set_xlabel('R_CC, computation over communication', fontsize=8)
    sizes = f'M={case.sizes.M:,}, F={case.sizes.F:,}'
    ax.set_title(f'SIMULATED: {case.title}, {sizes}', fontsize=8)
    handles |= {x.get_label(): x for x in ax.get_lines()}
  axes[0].set_ylabel('SIMULATED TFLOP/s of a device', fontsize=8)
  place, n = 'outside lower center', 1 + len(first)
  figure.legend(handles=[*handles.values()], loc=place, ncols=n, fontsize=7)
  figure.savefig(path, dpi=110)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The parsed command line, with overrides of the config in `overrides`."""
  parser = cli.parser('experiments.fastermoe_sim', __doc__)
  add = parser.add_argument
  for name, choices, text in (
    ('--trace', None, 'folder of a trace'),
    ('--counts', expert_counts.DRAWN, 'counts that are drawn'),
    ('--topology', [*CLUSTERS], 'machine; all of them if none is'),
  ):
    add(name, action='append', default=[], choices=choices, help=text)
  add('--config', default='', help='model whose layer is simulated')
  text = 'largest number of steps that are simulated'
  add('--steps', type=cli.POSITIVE, default=100, help=text)
  text = 'folder that is written'
  add('--output', default='results/fastermoe_sim', help=text)
  options, overrides = cli.parse_command(parser, argv, lambda x: x.config)
  options.overrides = overrides
  options.topology = options.topology or list(CLUSTERS)
  if not (options.trace or options.counts):
    options.counts = list(expert_counts.DRAWN)
  return options


def sizes_of(options: argparse.Namespace) -> Sizes:
  """The sizes of the simulated experts, of elements of float32.

  Raises:
    ValueError: The config's model has no experts.
  """
  M, F, kernels = clusters.WIDTH, clusters.HIDDEN, 2
  if options.config:
    config = cli.config_of(options.config, options.overrides)
    moe = run_config.read(config).filled(257).build().stacks.moe
    if moe is None:
      raise InputError(f'{options.config} has no experts to simulate')
    M, ffn = config.model.width, moe.expert.twin(1).ffn
    F = ffn.hidden
    kernels = ffn.kernel_values(M) // (M * F)
  return Sizes(M, F, kernels=kernels)


@cli.reported()
def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Simulates and writes tables and figures; returns their folder."""
  options = parse(argv)
  folder = pathlib.Path(options.output)
  folder.mkdir(parents=True, exist_ok=True)
  simulated, remarks = cases(options)
  if not simulated:
    raise InputError('nothing can be simulated: ' + '; '.join(remarks))
  roofline(simulated, folder / 'roofline.png')
  words = sys.argv[1:] if argv is None else argv
  command = shlex.join(['python', '-m', 'experiments.fastermoe_sim', *words])
  text = page(simulated, command, remarks)
  (folder / 'table.md').write_text(text, encoding='utf-8')
  cli.say([text])
  print(f'written: {folder}')
  return folder


if __name__ == '__main__':
  main()
