"""What a run shows beside its numbers: cost, a sample, plots, the report.

Each is a `Hook` of the training loop; `moe_jax.main` and experiments choose.
"""

import jax
import numpy as np
from rich.console import Console

from moe_jax import data, generation, models
from moe_jax.analysis import cost, plots, routing_report
from moe_jax.analysis.token_counts import token_counts
from moe_jax.config import merge
from moe_jax.kernels import backends
from moe_jax.training import metrics, summary
from moe_jax.training import workdir as workdir_lib
from moe_jax.training.evaluate import Evaluation
from moe_jax.training.setup import Hook, Run
from moe_jax.training.step import TrainState

_REPORT_BATCHES = 8
LEAK = (
  'moe.allow_future_leak=True: where capacity binds, later tokens change '
  'earlier outputs; losses are not those of a causal model'
)


class Facts(Hook):
  """Says at the start what is trained, on what, at which cost."""

  def start(self, run: Run) -> None:
    """Prints data, model, mesh and, where it applies, the leak."""
    run.message(run.dataset.describe())
    run.message(cost.count(run.model, run.config.data.seq_len).describe())
    moe = run.config.model.moe
    if run.model.config.moe is not None:
      layers = [i for i, sparse in enumerate(run.model.config.sparse) if sparse]
      run.message(
        f'sparse layers {layers}: {moe.num_experts} experts, '
        f'{moe.num_selected} selected, router {moe.router!r}, dispatch '
        f'{_dispatch(run)}'
      )
      if models.leaks_future(moe):
        run.message(f'WARNING: {LEAK}')
    sizes = {axis: n for axis, n in run.mesh.shape.items() if n > 1}
    kind = run.mesh.devices.flat[0].device_kind
    run.message(f'devices: {run.mesh.size} x {kind}, mesh {sizes or "of one"}')


def _dispatch(run: Run) -> str:
  moe = run.model.config.moe
  if moe.dispatch != 'dropless':
    return repr(moe.dispatch)
  platform = run.mesh.devices.flat[0].platform
  platform = 'cuda' if platform == 'gpu' else platform
  products = backends.describe(moe.grouped_matmul, platform)
  return f'{moe.dispatch!r} (grouped products: {products})'


class Sample(Hook):
  """Ends a run with a text sample, printed and in `sample.txt`."""

  def end(self, run: Run, state: TrainState) -> None:
    """Continues `config.sample.prompt` with room for every token."""
    c = run.config
    if c.sample.num_tokens < 1:
      return
    tokenizer = run.dataset.tokenizer
    room = {'model': {'moe': {'capacity_rule': 'all', 'dispatch': 'dropless'}}}
    tokens = generation.sample(
      models.build(merge(c, room)),
      state.params,
      tokenizer.encode(c.sample.prompt),
      num_tokens=c.sample.num_tokens,
      context_len=c.data.seq_len,
      temperature=c.sample.temperature,
      key=jax.random.key(c.sample.seed),
    )
    text = c.sample.prompt + tokenizer.decode(tokens)
    workdir_lib.write_text(run.workdir / 'sample.txt', text + '\n')
    run.message(f'sample, temperature {c.sample.temperature}:\n{text}')


class Plots(Hook):
  """Ends a run with `curves.png`, and `load.png` of a sparse model."""

  def end(self, run: Run, state: TrainState) -> None:
    """Draws what `metrics.jsonl` holds."""
    rows = metrics.read_metrics(run.workdir / metrics.FILE_NAME)
    drawn = [run.workdir / 'curves.png']
    plots.plot_curves(rows, drawn[0])
    if run.model.config.moe is not None:
      drawn.append(run.workdir / 'load.png')
      plots.plot_load(rows, drawn[1])
    run.message('plots: ' + ', '.join(map(str, drawn)))


class RoutingReport(Hook):
  """Ends a run of a sparse model with a table of what its routers did."""

  def end(self, run: Run, state: TrainState) -> None:
    """Prints the table and writes `routing_report.md` and `.json`."""
    if run.model.config.moe is None:
      return
    layers = layer_stats(run, state)
    table = routing_report.routing_table(
      layers, run.dataset.tokenizer.token_name
    )
    if models.leaks_future(run.config.model.moe):
      table = [{**row, 'warning': LEAK} for row in table]
    routing_report.write_report(run.workdir, table)
    routing_report.print_report(Console(), table)


def layer_stats(run: Run, state: TrainState) -> list[routing_report.LayerStats]:
  """Each sparse layer over validation batches at the training capacity."""
  evaluation = Evaluation('routing', 0, _REPORT_BATCHES, run.model)
  sums = run.evaluate([evaluation], state.params)['routing']
  batches = data.eval_batches(
    run.dataset.splits['validation'],
    batch_size=run.config.batch_size,
    num_batches=_REPORT_BATCHES,
  )
  counts = token_counts(run.model, state.params, batches)
  stats = sums.aux.stats
  return [
    routing_report.LayerStats(
      layer=i,
      load=stats.load[i],
      kept=stats.kept_load[i],
      drop_rate_by_choice=stats.overflowed[i] / stats.tokens[i],
      entropy=float(stats.entropy[i] / stats.tokens[i]),
      router_logit_rms=float(np.sqrt(stats.logit_square[i] / stats.tokens[i])),
      token_counts=counts[i],
    )
    for i in summary.sparse_layers(sums)
  ]


def default_hooks() -> list[Hook]:
  """What the main program wires in."""
  return [Facts(), Plots(), RoutingReport(), Sample()]
