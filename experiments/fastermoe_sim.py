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
from collections.abc import Iterator, Sequence

from experiments.faster_moe import (
  clusters,
  expert_counts,
  simulate,
  simulated_figures,
  simulated_tables,
)
from experiments.faster_moe.clusters import Cluster
from experiments.faster_moe.expert_counts import Chosen
from experiments.faster_moe.simulated_tables import Case
from moe_jax import cli, run_config
from moe_jax.errors import InputError
from moe_jax.parallel.cost_model import Sizes

# Tokens of a device that are drawn.
DRAWN = 1024


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The parsed command line, with overrides of the config in `overrides`."""
  parser = cli.Parser(
    prog='python -m experiments.fastermoe_sim',
    description=__doc__.split('\n')[0],
    allow_abbrev=False,
  )

  def add_several(name, choices, text):
    parser.add_argument(
      name, action='append', default=[], choices=choices, help=text
    )

  add_several('--trace', None, 'folder of a trace')
  add_several('--counts', expert_counts.DRAWN, 'counts that are drawn')
  add_several('--topology', clusters.NAMES, 'machine; all of them if none is')
  add = parser.add_argument
  add('--config', default='', help='model whose layer is simulated')
  add(
    '--steps',
    type=cli.POSITIVE,
    default=100,
    help='largest number of steps that are simulated',
  )
  add(
    '--output', default='results/fastermoe_sim', help='folder that is written'
  )
  options, overrides = cli.parse_command(
    parser, argv, lambda options: options.config
  )
  options.overrides = overrides
  options.topology = options.topology or list(clusters.NAMES)
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


def chosen(
  options: argparse.Namespace, source: str, cluster: Cluster
) -> Iterator[Chosen]:
  """The choices of a source, a kind of draws or the folder of a trace."""
  if source in expert_counts.DRAWN:
    W = cluster.num_devices
    return expert_counts.drawn(source, W, W * DRAWN, options.steps)
  return expert_counts.recorded(source, options.steps)


def cases(options: argparse.Namespace) -> tuple[list[Case], list[str]]:
  """Simulates all sources on all machines.

  Returns:
    The cases, and remarks on traces and on what cannot be simulated.
  """
  layer = sizes_of(options)
  simulated: list[Case] = []
  remarks = [expert_counts.about(folder) for folder in options.trace]
  for source in (*options.trace, *options.counts):
    for name in options.topology:
      cluster = clusters.get(name)
      sizes = layer._replace(bytes_per_element=cluster.bytes_per_element)
      try:
        counts = expert_counts.counts_of(
          chosen(options, source, cluster),
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


def command_of(argv: Sequence[str] | None) -> str:
  """The command that was given, to be printed with its output."""
  words = sys.argv[1:] if argv is None else argv
  return shlex.join(['python', '-m', 'experiments.fastermoe_sim', *words])


@cli.reported()
def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Simulates and writes tables and figures; returns their folder."""
  options = parse(argv)
  folder = pathlib.Path(options.output)
  folder.mkdir(parents=True, exist_ok=True)
  simulated, remarks = cases(options)
  if not simulated:
    raise InputError('nothing can be simulated: ' + '; '.join(remarks))
  simulated_figures.roofline(simulated, folder / 'roofline.png')
  simulated_figures.speed_ups(simulated, folder / 'speed_ups.png')
  text = simulated_tables.page(simulated, command_of(argv), remarks)
  (folder / 'table.md').write_text(text, encoding='utf-8')
  cli.say([text])
  print(f'written: {folder}')
  return folder


if __name__ == '__main__':
  main()
