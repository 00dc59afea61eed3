"""Definitions of routing and dispatch from papers, in numpy and plain loops.

The code is tested against these, which handle one token and one choice at a
time, in float64. Nothing here is fast, and nothing is taken from `moe_jax`.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr  # the standard normal distribution function


class Reference(NamedTuple):
  """A routing with the fate of each choice; arrays [G, S, K]."""

  expert_index: np.ndarray
  slot: np.ndarray
  gate: np.ndarray
  kept: np.ndarray
  fate: np.ndarray  # 'padding', 'unsent', 'full' or 'served'


def softmax(logits):
  exp = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


def capacity(
  rule, factor, rounding, multiple, minimum, slots, *, S, E, K
) -> int:
  """Slots per expert in integers alone; `factor` is (numerator, denominator).

  `per_token` is CF*S/E, `per_assignment` CF*K*S/E, `fraction` CF*S rounded up
  and nothing else.
  """
  if rule == 'all':
    return S
  if rule == 'fixed':
    return min(slots, S)
  if rule == 'fraction':
    return min(-(-factor[0] * S // factor[1]), S)
  above, below = factor[0] * S, factor[1] * E
  if rule == 'per_assignment':
    above *= K
  whole, rest = divmod(above, below)
  up = {
    'floor': False,
    'ceil': rest > 0,
    'round': 2 * rest > below or (2 * rest == below and whole % 2 == 1),
  }[rounding]
  count = max(whole + up, minimum)
  while count % multiple:
    count += 1
  return min(count, S)


def choose(logits, K):
  """The K largest of one token's logits; ties go to the lower expert."""
  return sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:K]


def limited_scores(scores, num_groups, chosen_groups, best, outside):
  """One token's scores, with `outside` for all but its best groups.

  A group of consecutive experts is as good as the sum of its `best` largest
  scores; ties go to the lower group.
  """
  size = len(scores) // num_groups
  members = [range(g * size, (g + 1) * size) for g in range(num_groups)]
  rates = [sum(sorted(scores[e] for e in m)[-best:]) for m in members]
  chosen = choose(rates, chosen_groups)
  return np.array(
    [s if e // size in chosen else outside for e, s in enumerate(scores)]
  )


def soft_moe(x, w, scale, experts):
  """The outputs of Soft MoE for one sequence of real tokens, slot by slot.

  Args:
    x: Tokens [S, M].
    w: Parameters of slots [M, E, C].
    scale: The factor of cosines.
    experts: A function for each expert, of one vector.
  """
  (S, _), (_, E, C) = x.shape, w.shape
  logits = np.zeros((S, E, C))
  for s, e, c in np.ndindex(S, E, C):
    length = np.linalg.norm(x[s]) * np.linalg.norm(w[:, e, c])
    logits[s, e, c] = scale * x[s] @ w[:, e, c] / length
  y = np.zeros_like(x)
  mixed = [softmax(logits[s].ravel()).reshape(E, C) for s in range(S)]
  for e, c in np.ndindex(E, C):
    share = softmax(logits[:, e, c])  # over tokens
    output = experts[e](sum(share[s] * x[s] for s in range(S)))
    for s in range(S):
      y[s] += mixed[s][e, c] * output
  return y


def visits(slot_priority, logits, K):
  """Pairs (token, choice) of one group in the order they are served in."""
  tokens = list(range(len(logits)))
  if slot_priority == 'token_major':
    return [(s, k) for s in tokens for k in range(K)]
  if slot_priority == 'batch_priority':
    top = softmax(logits).max(-1)
    tokens.sort(key=lambda s: (-top[s], s))
  return [(s, k) for k in range(K) for s in tokens]


def is_sent(second_policy, k, relative_gate, draw, threshold):
  """Whether a choice of rank k is sent; the first always is."""
  if k == 0 or draw is None or second_policy == 'all':
    return True
  if second_policy == 'sampled':  # GShard, Algorithm 1
    return 2 * relative_gate > draw
  return min(1.0, relative_gate / threshold) > draw  # ST-MoE, section C.2


def token_choice(
  logits,
  *,
  num_selected,
  capacity,
  mask=None,
  gates='raw',
  slot_priority='token_major',
  second_policy='all',
  second_threshold=0.2,
  draws=None,
) -> Reference:
  """Token choice, one choice after another, for given uniform draws."""
  logits = np.asarray(logits, np.float64)
  (G, S, _), K = logits.shape, num_selected
  mask = np.ones((G, S), bool) if mask is None else np.asarray(mask)
  num_slots = math.inf if capacity is None else capacity
  expert_index = np.zeros((G, S, K), int)
  slot = np.zeros((G, S, K), int)
  gate = np.zeros((G, S, K))
  fate = np.full((G, S, K), 'padding', dtype=object)
  for g in range(G):
    for s in range(S):
      expert_index[g, s] = choose(logits[g, s], K)
    queue = [0] * logits.shape[-1]
    for s, k in visits(slot_priority, logits[g], K):
      if not mask[g, s]:
        continue
      relative = relative_gates(logits[g, s], expert_index[g, s])
      draw = None if draws is None else draws[g, s, k]
      sent = is_sent(second_policy, k, relative[k], draw, second_threshold)
      fate[g, s, k] = 'unsent'
      if not sent and second_policy == 'threshold':
        continue
      expert = expert_index[g, s, k]
      slot[g, s, k], queue[expert] = queue[expert], queue[expert] + 1
      if slot[g, s, k] >= num_slots:
        fate[g, s, k] = 'full'
      elif sent:
        fate[g, s, k] = 'served'
    for s in range(S):
      served = fate[g, s] == 'served'
      gate[g, s] = token_gates(gates, logits[g, s], expert_index[g, s], served)
  return Reference(expert_index, slot, gate, fate == 'served', fate)


def relative_gates(logits, chosen):
  """Relative gates g_i / (g_1 + ... + g_K) of one token."""
  gate = softmax(logits)[chosen]
  return gate / gate.sum()


def token_gates(gates, logits, chosen, served):
  """The K gates of one token; 0 for a choice that is not served."""
  gate = softmax(logits)[chosen]
  if gates.startswith('sigmoid'):
    gate = 1 / (1 + np.exp(-logits[chosen]))
  if gates == 'sigmoid_renormalized':
    gate = gate / (gate.sum() + 1e-20)
  if gates == 'renormalized':
    gate = gate / gate.sum()
  gate = np.where(served, gate, 0.0)
  if gates == 'renormalized_after_drop' and served.any():
    gate = gate / gate.sum()
  return gate


def sparse_mixer(logits, K, threshold, draws=None):
  """The experts of one token and their gates under SparseMixer.

  Each choice takes the largest remaining logit, or the next of `draws`. Its
  gate is its share of exp(logit) among the logits near the largest one.
  """
  candidates = list(range(len(logits)))
  experts, gates = [], []
  for k in range(K):
    top = max(logits[e] for e in candidates)
    near = [
      e
      for e in candidates
      if not top - logits[e] > threshold * max(abs(logits[e]), top)
    ]
    best = choose([logits[e] for e in candidates], 1)[0]
    expert = candidates[best] if draws is None else draws[k]
    total = sum(math.exp(logits[e]) for e in near)
    gates.append(math.exp(logits[expert]) / total if expert in near else 0.0)
    experts.append(expert)
    candidates.remove(expert)
  return experts, gates


def gshard_top_2(logits, capacity, draws) -> Reference:
  """Algorithm 1 of arXiv:2006.16668, its two loops as printed, one group."""
  logits = np.asarray(logits, np.float64)
  S, E = logits.shape
  g = softmax(logits)
  count = np.zeros(E, int)  # c_e of the paper
  index = np.array([choose(logits[s], 2) for s in range(S)])
  slot, gate = np.zeros((S, 2), int), np.zeros((S, 2))
  for k in range(2):
    for s in range(S):
      e = index[s, k]
      share = g[s, e] / (g[s, index[s, 0]] + g[s, index[s, 1]])
      slot[s, k] = count[e]
      is_drawn = k == 0 or 2 * share > draws[s, 1]
      if count[e] < capacity and is_drawn:
        gate[s, k] = share
      count[e] += 1  # counted even where the draw did not send it
  return Reference(index, slot, gate, gate > 0, None)


def kth_excluding(values, K, i):
  """The K-th largest of the values without entry i."""
  return sorted(np.delete(values, i), reverse=True)[K - 1]


def load_probability(clean, noisy, std, K):
  """P(x, i) of arXiv:1701.06538, Eq. 8-9; arrays [G, S, E]."""
  P = np.ones(clean.shape)
  for g, s, e in np.ndindex(clean.shape):
    if clean.shape[-1] > K:
      edge = kth_excluding(noisy[g, s], K, e)
      P[g, s, e] = ndtr((clean[g, s, e] - edge) / std[g, s, e])
  return P


def balance_loss(probs, expert_index, mask, choices='all'):
  """Balance loss E * sum_e f_e P_e over the real tokens of each group, [G]."""
  G, _, E = probs.shape
  ranks = expert_index.shape[-1] if choices == 'all' else 1
  loss = np.zeros(G)
  for g in range(G):
    real = [s for s in range(len(mask[g])) if mask[g, s]]
    for e in range(E if real else 0):
      chosen = [k for s in real for k in expert_index[g, s, :ranks] if k == e]
      f = len(chosen) / (len(real) * ranks)
      loss[g] += E * f * sum(probs[g, s, e] for s in real) / len(real)
  return loss


def z_loss(logits, mask):
  """Z-loss, the mean over real tokens of (log sum_j exp(x_j))^2, [G]."""
  loss = np.zeros(len(logits))
  for g in range(len(logits)):
    real = logits[g][mask[g]]
    if len(real):
      loss[g] = np.mean([math.log(np.exp(x).sum()) ** 2 for x in real])
  return loss


def squared_cv(values):
  return (np.std(values) / np.mean(values)) ** 2 if np.any(values) else 0.0


def importance_loss(gate, expert_index, mask, E):
  """Importance loss CV(sum over tokens of the gates)^2, [G]."""
  importance = np.zeros((len(gate), E))
  for g, s, k in np.ndindex(gate.shape):
    if mask[g, s]:
      importance[g, expert_index[g, s, k]] += gate[g, s, k]
  return np.array([squared_cv(row) for row in importance])


def load_loss(probability, mask):
  """Load loss CV(sum over tokens of P(x, i))^2, [G]."""
  return np.array(
    [squared_cv(probability[g][mask[g]].sum(0)) for g in range(len(mask))]
  )


def two_levels(branch_logits, expert_logits, K1, K2):
  """Choices and gates gp_i * g_ij of arXiv:1701.06538, Eq. 12, one token.

  Expert (i, j) is number i * b + j; logits are [a] and [a, b], with noise.
  """
  b = expert_logits.shape[1]
  index, gate = [], []
  branches = choose(branch_logits, K1)
  for i, gp in zip(branches, relative_gates(branch_logits, branches)):
    experts = choose(expert_logits[i], K2)
    for j, g in zip(experts, relative_gates(expert_logits[i], experts)):
      index.append(i * b + j)
      gate.append(gp * g)
  return index, gate


def two_level_losses(clean, noisy, std, K1, K2, mask):
  """CV^2 of Importance_H and of Load_H, Eq. 13-14, of one group.

  Each of the first three is a pair of branches' [S, a] and experts' [S, a, b].
  """
  a, b = clean[1].shape[1:]
  importance, load = np.zeros((a, b)), np.zeros((a, b))
  branch_load, number = np.zeros(a), np.zeros(a)
  for s in np.flatnonzero(mask):
    index, gate = two_levels(noisy[0][s], noisy[1][s], K1, K2)
    for e, g in zip(index, gate):
      importance[e // b, e % b] += g
    branch_load += load_probability(
      *(x[0][None, s, None] for x in (clean, noisy, std)), K1
    )[0, 0]
    for i in {e // b for e in index}:  # the branches that the token chose
      number[i] += 1
      load[i] += load_probability(
        *(x[1][None, s, None, i] for x in (clean, noisy, std)), K2
      )[0, 0]
  for i in range(a):
    load[i] *= branch_load[i] / number[i] if number[i] else 0
  return squared_cv(importance), squared_cv(load)


def routing_stats(routing: Reference, logits, mask):
  """All statistics, by counting the fates of the real tokens' choices."""
  E, K = logits.shape[-1], routing.slot.shape[-1]
  stats = {
    'tokens': 0,
    'load': np.zeros(E),
    'kept_load': np.zeros(E),
    'overflowed': np.zeros(K),
    'unsent': np.zeros(K),
    'entropy': 0.0,
    'logit_square': 0.0,
  }
  for g, s in zip(*np.nonzero(mask)):
    stats['tokens'] += 1
    p = softmax(logits[g, s])
    stats['entropy'] += sum(-q * math.log(q) for q in p)
    stats['logit_square'] += sum(x * x for x in logits[g, s]) / E
    for k in range(K):
      expert, fate = routing.expert_index[g, s, k], routing.fate[g, s, k]
      stats['load'][expert] += 1
      stats['kept_load'][expert] += fate == 'served'
      stats['overflowed'][k] += fate == 'full'
      stats['unsent'][k] += fate == 'unsent'
  return stats


def _served(routing):
  """Yields (g, s, k, expert, row) of served choices; R counts g, then slots."""
  kept, slot, expert = (
    np.asarray(x) for x in (routing.kept, routing.slot, routing.expert_index)
  )
  for g, s, k in zip(*np.nonzero(kept)):
    yield g, s, k, expert[g, s, k], g * routing.capacity + slot[g, s, k]


def slot_of_row(routing) -> np.ndarray:
  """The slots [E * G * C] of the rows sorted by expert.

  Sorted rows are ordered by expert, group, token and choice. Behind the last
  one are rows without a slot, up to min(G*S*K, E*G*C) rows.
  """
  G, S, K = routing.kept.shape
  E, C = routing.num_experts, routing.capacity
  served = sorted(_served(routing), key=lambda choice: choice[3])  # stable
  slots = [expert * G * C + row for *_, expert, row in served]
  none = [E * G * C] * (min(G * S * K, E * G * C) - len(slots))
  return np.array(slots + none, np.int32)


def dispatch(x, routing):
  """Rows [E, G*C, M]: each served choice copies its token to its slot."""
  G, _, M = x.shape
  rows = np.zeros((routing.num_experts, G * routing.capacity, M))
  for g, s, _, e, r in _served(routing):
    rows[e, r] += x[g, s]
  return rows


def dispatch_gradient(d_rows, routing):
  """Gradient of `dispatch`: each served choice returns its row's gradient."""
  d_x = np.zeros((*routing.kept.shape[:2], d_rows.shape[-1]))
  for g, s, _, e, r in _served(routing):
    d_x[g, s] += d_rows[e, r]
  return d_x


def combine(rows, routing):
  """The gated sum of the outputs of each token's served choices, [G, S, M]."""
  y = np.zeros((*routing.kept.shape[:2], rows.shape[-1]))
  for g, s, k, e, r in _served(routing):
    y[g, s] += float(routing.gate[g, s, k]) * rows[e, r]
  return y


def combine_gradient(dy, rows, routing):
  """Gradients of `combine` with respect to rows and to gates."""
  d_rows, d_gate = np.zeros(rows.shape), np.zeros(routing.kept.shape)
  for g, s, k, e, r in _served(routing):
    d_rows[e, r] += float(routing.gate[g, s, k]) * dy[g, s]
    d_gate[g, s, k] = rows[e, r] @ dy[g, s]
  return d_rows, d_gate


def grouped_matmul(x, w, group_sizes):
  """Each row times its group's kernel, [N, F]; zero behind the last group."""
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  y = np.zeros((len(x), w.shape[2]))
  for n, e in _grouped(group_sizes):
    y[n] = x[n] @ w[e]
  return y


def grouped_outer(x, dy, group_sizes):
  """Sum of x[n]^T dy[n] over each group's rows, [E, M, F]."""
  x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
  dw = np.zeros((len(group_sizes), x.shape[1], dy.shape[1]))
  for n, e in _grouped(group_sizes):
    dw[e] += np.outer(x[n], dy[n])
  return dw


def _grouped(group_sizes):
  """Yields (row, expert) of each row that is in a group, in order."""
  experts = [e for e, size in enumerate(group_sizes) for _ in range(size)]
  return enumerate(experts)


def expert_choice(logits, capacity, mask):
  """Tokens in slots [G, E, C], S for an empty slot, and the slots' gates.

  Each expert takes the likeliest of the group's real tokens, in that order; of
  n real ones ceil(C * n / S).
  """
  G, S, E = logits.shape
  token_index = np.full((G, E, capacity), S)
  gate = np.zeros((G, E, capacity))
  for g in range(G):
    real = [s for s in range(S) if mask[g, s]]
    for e in range(E):
      p = {s: softmax(logits[g, s])[e] for s in real}
      ranking = sorted(real, key=lambda s: (-p[s], s))
      for c, s in enumerate(ranking[: math.ceil(capacity * len(real) / S)]):
        token_index[g, e, c], gate[g, e, c] = s, p[s]
  return token_index, gate


def slots_gradients(routing, x, dy, rows, d_rows):
  """Values and gradients where experts choose, with rows [E, G*C, M].

  Returns rows, the gradient of x, outputs y, and the gradients of rows and of
  gates.
  """
  G, E, C = routing.gate.shape
  dispatched, d_x = np.zeros(rows.shape), np.zeros(x.shape)
  y, rows_gradient = np.zeros(x.shape), np.zeros(rows.shape)
  gate_gradient = np.zeros(routing.gate.shape)
  for g in range(G):
    for e in range(E):
      for c in range(C):
        s, r = int(routing.token_index[g, e, c]), g * C + c
        gate = float(routing.gate[g, e, c])
        if s == routing.group_size:
          continue
        dispatched[e, r] = x[g, s]
        d_x[g, s] += d_rows[e, r]
        y[g, s] += gate * rows[e, r]
        rows_gradient[e, r] = gate * dy[g, s]
        gate_gradient[g, e, c] = rows[e, r] @ dy[g, s]
  return dispatched, d_x, y, rows_gradient, gate_gradient


def scrambled(x: int) -> int:
  """The last step of MurmurHash3, on 32 bits."""
  x %= 2**32
  x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
  x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
  return x ^ x >> 16


def hash_choice(number, *, E, K, seed, layer):
  """The K experts of an id, by draws without replacement."""
  salt = scrambled(scrambled(seed) + layer)
  draws = [scrambled(scrambled(number) + scrambled(salt + k)) for k in range(K)]
  return drawn(draws, E)


def drawn(draws, E):
  """Experts by draws, each among those that the token does not have yet."""
  candidates = list(range(E))
  return [candidates.pop(draw % len(candidates)) for draw in draws]


def balanced_gates(logits, margin):
  """Gates of successive batches [T, B, E], balanced by running totals.

  An expert sits out a step if its gates, summed over all steps before, are more
  than `margin` above the mean of these sums.
  """
  T, B, E = np.shape(logits)
  totals, gates = [0.0] * E, np.zeros((T, B, E))
  for t in range(T):
    mean = sum(totals) / E
    allowed = [e for e in range(E) if totals[e] - mean <= margin]
    for b in range(B):
      probs = softmax(np.asarray(logits[t][b], np.float64))
      for e in allowed:
        gates[t, b, e] = probs[e] / sum(probs[i] for i in allowed)
    for e in range(E):
      totals[e] += gates[t, :, e].sum()
  return gates


def lstm(x, p, segment_ids):
  """The outputs h [T, M] of one row, by the six equations of the LSTM cell.

  p has w_in and w_state [M, 4, H] and b_gates [4, H] of the gates i, f, g, o,
  and w_out [H, M] or None.
  """

  def sigmoid(v):
    return 1 / (1 + np.exp(-v))

  M, _, H = p['w_in'].shape
  h, c, last, out = np.zeros(M), np.zeros(H), 0, []
  for t in range(len(x)):
    if segment_ids[t]:
      if segment_ids[t] != last:
        h, c, last = np.zeros(M), np.zeros(H), segment_ids[t]
      i, f, g, o = (
        x[t] @ p['w_in'][:, n] + h @ p['w_state'][:, n] + p['b_gates'][n]
        for n in range(4)
      )
      c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
      h = sigmoid(o) * np.tanh(c)
      h = h @ p['w_out'] if p['w_out'] is not None else h
    out.append(h)
  return np.array(out)


def strictly_balanced(logits, m, mask, thresholds):
  """Appendix F of arXiv:1701.06538, one group: three arrays and a loss.

  The gates [S, E] of training (each expert's m likeliest real tokens) and of
  inference (gates above thresholds), both renormalised over a token's experts;
  and loss_batchwise, a sum over tokens.
  """
  S, E = logits.shape
  p = softmax(logits)
  batch, above = np.zeros((S, E), bool), np.zeros((S, E), bool)
  loss = 0.0
  for i in range(E):
    real = [s for s in range(S) if mask[s]]
    for s in sorted(real, key=lambda s: (-p[s, i], s))[:m]:
      batch[s, i] = True
    for s in real:
      above[s, i] = p[s, i] > thresholds[i]
      loss += (int(above[s, i]) - int(batch[s, i])) * (p[s, i] - thresholds[i])
  gates = []
  for chosen in (batch, above):
    gate = np.where(chosen, p, 0)
    total = gate.sum(1, keepdims=True)
    gates.append(gate / np.where(total > 0, total, 1))
  return *gates, loss


def node_of_group(group, groups, devices, per_node):
  """The node of a group; devices in order have equally many groups each."""
  owner = [d for d in range(devices) for _ in range(groups // devices)]
  return owner[group] // per_node


def limited_choice(logits, node, mask, K, Q, limit):
  """FasterMoE's gate: `limit` tokens of a group may choose remote experts."""
  G, S, E = logits.shape
  index = np.zeros((G, S, K), int)
  for g in range(G):
    local = [e for e in range(E) if e // (E // Q) == node[g]]
    scores = {}  # of the tokens that want to leave
    for s in range(S):
      index[g, s] = choose(logits[g, s], K)
      remote = [e for e in index[g, s] if e not in local]
      if mask[g, s] and remote:
        scores[s] = softmax(logits[g, s])[remote].max()
    for s in sorted(scores, key=lambda s: (-scores[s], s))[limit:]:
      index[g, s] = _best_of(local, logits[g, s], K)
  return index


def _best_of(experts, logits, K):
  """The K of these experts with the largest logits; ties go to the lower."""
  return sorted(experts, key=lambda e: (-logits[e], e))[:K]


def gptq(w, h, nearest):
  """GPTQ by elimination: each input is rounded, and taken out of inverse(H).

  Args:
    w: A kernel [I, O].
    h: The Hessian [I, I], damped.
    nearest: The function nearest(row) that rounds the weights of an input.

  Returns:
    The rounded kernel [I, O].
  """
  w, inverse = np.array(w, np.float64), np.linalg.inv(h)
  rounded = np.zeros_like(w)
  for i in range(len(w)):
    rounded[i] = nearest(w[i])
    error = (w[i] - rounded[i]) / inverse[i, i]
    w -= np.outer(inverse[i], error)
    inverse -= np.outer(inverse[i], inverse[i]) / inverse[i, i]
    inverse[i] = inverse[:, i] = 0.0
  return rounded


def uniform_grid(weights, bits):
  """Scale and zero of one group of weights, without rounding the scale up."""
  low, high = min(weights.min(), 0.0), max(weights.max(), 0.0)
  scale = (high - low) / (2**bits - 1) or 1.0
  return scale, round(-low / scale)
