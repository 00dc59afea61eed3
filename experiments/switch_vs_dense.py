"""Does a sparse model beat its dense twin at equal FLOPs per token?

    python -m experiments.switch_vs_dense --preset=quick
    python -m experiments.launch --items=experiments/switch_vs_dense.py \
      --workers=2    # its runs alone, of the quick preset, several at a time

Byte-level decoders on the embedded corpus: the dense twin, Switch (one of E =
4, 8, 16 experts of the dense width) and top-2 of 16 experts of half the width,
every feed-forward sparse, on paired seeds and data order. Writes `table.md`,
`results.json` and `curves.png`. `quick` takes under ten minutes on two cores
and is too short for the gaps to open fully: they grow with the steps.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from configs import base
from experiments.launch import Item
from experiments.study import (
  Arm,
  Interval,
  markdown_table,
  run_study,
  study_items,
)
from moe_jax import host, models
from moe_jax.analysis import cost
from moe_jax.config import merge
from moe_jax.training import metrics

PRESETS = {
  'quick': dict(steps=700, seeds=3),
  'full': dict(steps=6000, seeds=5),
}
OUTPUT = 'results/switch_vs_dense'

EVAL = 'train_capacity'
ROOM = 'all_tokens'


def get_config(steps: int | str = PRESETS['quick']['steps']):
  """The study's config: what all arms share, with the dense twin's model."""
  steps = int(steps)
  config = base.get_config()
  config.total_steps = steps
  config.batch_size = 32
  config.log_every_steps = max(steps // 20, 1)
  config.data.seq_len = 64
  m = config.model
  m.num_layers = 4
  m.width = 64
  m.num_heads = 4
  m.hidden = 256
  m.scan_layers = False
  m.moe.layers = 'all'
  m.moe.num_experts = 0
  m.moe.group_size = 2048
  m.moe.capacity_rule = 'per_assignment'
  m.moe.capacity_factor = 1.25
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = min(100, steps)
  config.checkpoint.every_steps = 0
  config.evals = {
    EVAL: base.evaluation(every_steps=max(steps // 5, 1), num_batches=40),
    ROOM: base.evaluation(
      every_steps=0,
      num_batches=40,
      moe=dict(capacity_rule='all', dispatch='dropless'),
    ),
  }
  return config.lock()


def arms() -> list[Arm]:
  """The dense twin first: the others are compared with it."""
  found = [Arm('dense', {})]
  for E in (4, 8, 16):
    moe = dict(num_experts=E, num_selected=1, gates='raw')
    found.append(Arm(f'switch_{E}', {'model': {'moe': moe}}))
  top2 = dict(num_experts=16, num_selected=2, hidden=128, gates='renormalized')
  return [*found, Arm('top2_of_16', {'model': {'moe': top2}})]


def get_items() -> list[Item]:
  """The quick preset's runs, for `experiments.launch`."""
  preset = PRESETS['quick']
  return study_items(
    f'experiments/switch_vs_dense.py:{preset["steps"]}',
    arms(),
    range(preset['seeds']),
    pathlib.Path(OUTPUT),
  )


def make_table(config, results) -> list[dict[str, str]]:
  """A row an arm: loss, paired difference, speed, size."""
  dense = results['dense']
  rows = []
  for arm in arms():
    runs = results[arm.name]
    merged = merge(config, {'model': {'vocab_size': 257}})
    merged = merge(merged, arm.overrides)
    leaks = models.leaks_future(merged.model.moe)
    model = models.build(merged)
    price = cost.count(model, config.data.seq_len)
    loss, room = f'eval/{EVAL}/loss', f'eval/{ROOM}/loss'
    difference = Interval.of(
      [run[loss] - twin[loss] for run, twin in zip(runs, dense, strict=True)]
    )
    ratio = Interval.of(
      [
        run['median_step_seconds'] / twin['median_step_seconds']
        for run, twin in zip(runs, dense, strict=True)
      ]
    )
    tokens = config.batch_size * config.data.seq_len
    speed = Interval.of([tokens / run['median_step_seconds'] for run in runs])
    drops = [run.get(f'eval/{EVAL}/drop_rate', 0.0) for run in runs]
    twin = arm.name == 'dense'
    leak = ' (leaks the future)' if leaks else ''
    rows.append(
      {
        'model': arm.name + leak,
        'loss (nats/byte)': f'{Interval.of([run[loss] for run in runs]):.4f}',
        'minus dense, paired': '' if twin else f'{difference:+.4f}',
        'verdict': '' if twin else difference.verdict(),
        'loss, no drops': f'{Interval.of([run[room] for run in runs]):.4f}',
        'dropped': '' if twin else f'{Interval.of(drops).mean:.2%}',
        'tokens/s': f'{speed.mean:,.0f}',
        'step / dense': '' if twin else f'{ratio:.2f}',
        'parameters': cost.short(price.total_params),
        'active': cost.short(price.active_params),
        'FLOPs/token': cost.short(price.training_flops),
      }
    )
  return rows


def write_plot(results, output: pathlib.Path) -> None:
  """Validation loss over steps, a line an arm, a shade over its seeds."""
  figure = Figure(figsize=(7, 4.5), layout='constrained')
  axes = figure.subplots()
  for name, runs in results.items():
    curves = []
    for i in range(len(runs)):
      folder = sorted((output / 'runs' / name).iterdir())[i]
      rows = metrics.read_metrics(folder / metrics.FILE_NAME)
      key = f'eval/{EVAL}/loss'
      curves.append([(r['step'], r[key]) for r in rows if key in r])
    steps = [step for step, _ in curves[0]]
    losses = [[loss for _, loss in curve] for curve in curves]
    columns = list(zip(*losses, strict=True))
    mean = [sum(column) / len(column) for column in columns]
    (line,) = axes.plot(steps, mean, marker='o', label=name)
    axes.fill_between(
      steps,
      [min(column) for column in columns],
      [max(column) for column in columns],
      color=line.get_color(),
      alpha=0.2,
      linewidth=0,
    )
  axes.set_xlabel('optimizer steps')
  axes.set_ylabel('validation loss (nats per byte)')
  axes.set_title('Equal FLOPs per token; shade: range over seeds')
  axes.legend()
  figure.savefig(output / 'curves.png', dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.switch_vs_dense',
    description=__doc__.split('\n')[0],
  )
  add = parser.add_argument
  add('--preset', default='quick', choices=list(PRESETS), help='length')
  add('--output', default=OUTPUT, help='where results and runs go')
  add('--steps', type=int, default=0, help="0: the preset's")
  add('--seeds', type=int, default=0, help="how many; 0: the preset's")
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the study and writes its table and plot."""
  options = parse(argv)
  host.keep_freed_memory()
  preset = PRESETS[options.preset]
  steps = options.steps or preset['steps']
  seeds = range(options.seeds or preset['seeds'])
  output = pathlib.Path(options.output)
  config = get_config(steps)
  results = run_study(config, arms(), seeds, output)
  table = markdown_table(make_table(config, results))
  digest = results['dense'][0]['data_digest']
  text = (
    '# Switch against its dense twin\n\n'
    f'{steps} steps, {len(seeds)} paired seeds, batch {config.batch_size} x '
    f'{config.data.seq_len} bytes of the embedded corpus (sha256 '
    f'{digest[:16]}), on this machine. ± is a 95 % confidence interval over '
    'seeds (Student); a verdict is about the paired difference in loss at the '
    'training capacity.\n\n'
    f'{table}'
  )
  (output / 'table.md').write_text(text, encoding='utf-8')
  (output / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
  write_plot(results, output)
  print(f'\n{text}\nwritten: {output}/table.md, results.json, curves.png')


if __name__ == '__main__':
  main()
