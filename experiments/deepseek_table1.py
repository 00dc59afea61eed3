"""Fine-grained and shared experts at equal parameters and equal FLOPs.

    python -m experiments.deepseek_table1 --preset=quick

DeepSeekMoE (https://arxiv.org/abs/2401.06066), its models of 2B parameters:
experts cut into quarters, of which four times as many are chosen, one of them
shared by all tokens, have a loss of 1.808 nats a token; GShard with whole
experts 1.867, Switch 1.881, a hash 1.932, a dense model 2.060. One, two or four
shared experts are alike, and without the shared one at evaluation, where each
token chooses one expert more instead, the loss is 2.414. These numbers are from
a secondary source. A run by others at a tenth of the tokens had 0.012 bits a
byte between GShard and DeepSeekMoE, 0.008 nats: expect no more here.

Here: a two-layer byte-level decoder. All sparse rows have as many parameters in
experts, and each token passes a hidden width of 256: whole experts are 16 of
width 128, two of which a token chooses, as in GShard; the fine-grained ones are
cut into quarters. Switch and the hash have 8 experts of width 256, one of which
a token chooses. Nothing is dropped, so that no row is worse for lack of room,
and all learned rows have the same balance loss, of all choices. Gates are those
of the papers: GShard's sum to one, Switch's and DeepSeekMoE's do not. Not here:
experts disabled by rank (Figure 4 of the paper), several shared experts, which
five seeds would hardly tell apart, and larger models of GShard.

Three seeds of the quick preset, of 100 steps, tell differences of 0.03 to 0.06
nats a byte, more than any that is expected: they resolve none of the claims.
The full preset, 6 arms and 5 seeds, was planned for 20 minutes on two idle
cores; its runs took 37 core minutes. The claims were written before any run.
"""

import dataclasses
from collections.abc import Sequence

from flax import traverse_util

from experiments.study import byte_models, command, parts, routing
from experiments.study.byte_models import top_k
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from moe_jax.layers.experts.experts import SHARED_EXPERT, SharedExpertOptions
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

HIDDEN = 256  # hidden width of all experts together that a token passes
SWITCH, GSHARD, HASH = 'Switch', 'GShard', 'hash'
FINE = 'fine-grained'
DEEPSEEK = 'DeepSeekMoE'
REMOVED = f'{DEEPSEEK}, its shared expert removed'
WITHOUT = 'removed/loss'
SHARED = 'shared/1 shared', 'shared/shared one removed'  # rows of the paper


def config(steps: int):
  """The config that the rows share."""
  config = byte_models.decoder(steps, hidden=HIDDEN, drops=False)
  config.model.moe.layer_reduce = 'mean'
  config.model.moe.router.token_choice.z_weight = 0.0
  return config


def experts(name: str, cut: int, shared: int = 0, gates: str = 'raw') -> Arm:
  """An arm whose 16 whole experts of 128 are each cut into smaller ones.

  Args:
    name: Name of the arm.
    cut: Number of parts of a whole expert.
    shared: Number of parts that all tokens pass, in the place of chosen ones.
    gates: Option of the router.
  """
  part = HIDDEN // (2 * cut)
  moe = {
    'num_experts': 16 * cut - shared,
    'expert.hidden': part,
    'shared_expert.hidden': shared * part,
    'router.token_choice.gates': gates,
  }
  return top_k(name, 2 * cut - shared, HIDDEN, moe)


def arms(_: Preset) -> list[Arm]:
  """The paper's five models, and cuts without sharing."""
  return [
    byte_models.dense(),
    top_k(HASH, 1, HIDDEN, {'router.kind': 'hash'}),
    top_k(SWITCH, 1, HIDDEN),
    experts(GSHARD, 1, gates='renormalized'),
    experts(FINE, 4),
    experts(DEEPSEEK, 4, 1),
  ]


def without_shared(run: Run, state: TrainState) -> dict[str, float]:
  """The loss without the shared expert, with one more chosen in its place."""
  moe = run.options.model.moe
  if not moe.shared_expert.hidden:
    return {}
  more = moe.num_selected + moe.shared_expert.hidden // moe.expert.hidden
  none = SharedExpertOptions()
  model = routing.changed_model(run, num_selected=more, shared_expert=none)
  evaluation = dataclasses.replace(routing.evaluation_of(run), model=model)
  variables = run.programs.variables(state)
  params = traverse_util.flatten_dict(variables['params'])
  kept = {path: x for path, x in params.items() if SHARED_EXPERT not in path}
  reduced = {**variables, 'params': traverse_util.unflatten_dict(kept)}
  return {WITHOUT: evaluation(reduced, int(state.step))['loss']}


def rows(results: parts.Results) -> list[Row]:
  """A row for each arm, and one for DeepSeekMoE without its shared expert."""
  table = [STUDY.row_of(Arm(name, {}), results) for name in results]
  losses = [run[WITHOUT] for run in results[DEEPSEEK]]
  return [*table, Row(REMOVED, {'loss': losses})]


def claim(
  better: str, worse: str, published: Sequence[str] | None = None
) -> parts.Claims:
  """A claim that one row has a lower loss than another.

  Args:
    better: Name of the row with the lower loss.
    worse: Name of the other row.
    published: The paper's table and row of both; () where the paper has no such
      pair. None takes the rows of these names in its table `comparison_2b`.
  """
  if published is None:
    published = [f'comparison_2b/{row}' for row in (better, worse)]
  cells = [f'deepseekmoe2024/{row}/pile_loss' for row in published]
  text = f'{better} is better than {worse}'
  return {text: Claim(f'loss: {better} < {worse}', cells)}


STUDY = Study(
  name='deepseek_table1',
  title='Fine-grained and shared experts at equal parameters',
  source='DeepSeekMoE, models of 2B parameters',
  config=config,
  arms=arms,
  rows=rows,
  presets={'quick': parts.trial(100, 3, [HASH, FINE]), 'full': Preset(1000, 5)},
  columns=[
    byte_models.LOSS,
    Column('largest load', byte_models.MAX_LOAD, 'x mean', 2),
  ],
  claims={
    **claim(DEEPSEEK, GSHARD),
    **claim(DEEPSEEK, SWITCH),
    **claim(GSHARD, SWITCH),
    **claim(SWITCH, HASH),
    **claim(HASH, 'dense'),
    **claim(DEEPSEEK, 'dense'),
    **claim(FINE, GSHARD, ()),
    **claim(DEEPSEEK, FINE, ()),
    **claim(DEEPSEEK, REMOVED, SHARED),
  },
  measure=without_shared,
  gates={'loss: Switch < dense': ['*']},
  figure=Figure(['loss', 'largest load'], without=[REMOVED]),
  remarks="Loads are relative to the mean of each row's own experts.",
  written='2026-11-28',
)
get_config, get_items = command.entries(STUDY, __name__)
