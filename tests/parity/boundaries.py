"""What each filter's rule leaves to rounding, in float64 from its definition.

Each function takes the filter's value, a relative precision and logits [V], and returns which
tokens a computation of that precision may keep or drop; of equals, the lowest index comes first.
"""

import numpy as np

INF = np.inf


def log_law(row: np.ndarray) -> np.ndarray:
  """log softmax."""
  z = np.asarray(row, np.float64)
  return z - z.max() - np.log(np.exp(z - z.max()).sum())


def entropy_terms(row: np.ndarray) -> np.ndarray:
  """-p log p in nats, with 0 log 0 = 0."""
  law = log_law(row)
  return -np.exp(law) * np.where(np.isfinite(law), law, 0)


def _before(key, weight):
  """The weight of what comes before each token, smallest key first, of equals lowest index."""
  order = np.argsort(key, kind="stable")
  out = np.empty(len(key))
  out[order] = np.cumsum(weight[order]) - weight[order]
  return out


def _below(key, weight, threshold):
  """The weight of the tokens whose key is below each threshold [V]."""
  order = np.argsort(key, kind="stable")
  cumulative = np.concatenate([[0.0], np.cumsum(weight[order])])
  return cumulative[np.searchsorted(key[order], threshold, side="left")]


def _log_scale(row):
  """The size of the numbers that a token's log-probability is computed from."""
  z = np.where(np.isfinite(row), row, 0).astype(np.float64)
  return 1 + np.abs(z) + np.abs(row.max())


def never(value, precision, row):
  """A rule that compares the logits alone."""
  return np.zeros(row.shape, bool)


def top_p(p, precision, row):
  """Kept where the tokens before have less than p."""
  return np.abs(_before(-np.float64(row), np.exp(log_law(row))) - p) <= precision


def min_p(share, precision, row):
  """Kept where p >= share max p."""
  least = max(share, 1e-300)
  return np.abs(np.float64(row) - row.max() - np.log(least)) <= precision * _log_scale(row)


def epsilon(cutoff, precision, row):
  """Kept where p >= cutoff."""
  return np.abs(log_law(row) - np.log(cutoff)) <= precision * _log_scale(row)


def eta(cutoff, precision, row):
  """Kept where p >= min(cutoff, sqrt(cutoff) exp(-H))."""
  boundary = min(np.log(cutoff), np.log(cutoff) / 2 - entropy_terms(row).sum())
  return np.abs(log_law(row) - boundary) <= precision * _log_scale(row)


def typicality(row):
  """|-log p - H|, what typical sampling keeps the smallest of."""
  return np.abs(log_law(row) + entropy_terms(row).sum())


def typical(mass, precision, row):
  """Kept where the more typical tokens have less than `mass`; near-ties may change places."""
  key, law = typicality(row), np.exp(log_law(row))
  slack = precision * _log_scale(row).max()
  least = _below(key, law, key - slack) - precision
  most = _below(key, law, key + slack) + precision
  return (least <= mass) & (mass <= most)


def top_h(alpha, precision, row, top_n=100):
  """Kept where the entropy terms up to the token's sum to alpha H at most, of the top n."""
  order = np.argsort(-np.float64(row), kind="stable")[:top_n]
  terms = entropy_terms(row[order])
  bound = alpha * terms.sum()
  out = np.zeros(row.shape, bool)
  out[order] = np.abs(np.cumsum(terms) - bound) <= precision * (1 + bound)
  return out


def top_n_sigma(n, precision, row):
  """Kept where z >= max z - n std z."""
  finite = np.float64(row[row > -INF])
  boundary = finite.max() - n * finite.std()
  return np.abs(np.float64(row) - boundary) <= precision * _log_scale(row).max()


def xtc(threshold, precision, row):
  """Removed where another token of p >= threshold is less likely."""
  near = np.abs(log_law(row) - np.log(threshold)) <= precision * _log_scale(row)
  return near | (near.any() & (np.float64(row) >= row[near].min() if near.any() else False))


def mirostat_v2(mu, precision, row):
  """Kept where -log2 p <= mu."""
  return np.abs(-log_law(row) / np.log(2) - mu) <= precision * _log_scale(row)


def zipf(mu, row, m=100):
  """Mirostat's exponent s and last rank ((s - 1) 2^mu / (1 - N^(1 - s)))^(1/s)."""
  top = np.sort(np.float64(row))[::-1][:m]
  t = np.log1p(1 / np.arange(1, len(top)))
  s = np.sum(t * (top[:-1] - top[1:])) / np.sum(t**2)
  with np.errstate(over="ignore", divide="ignore"):
    return s, np.power((s - 1) * 2.0**mu / (1 - len(row) ** (1 - s)), 1 / s)


def mirostat(mu, precision, row):
  """Kept where the rank is at most the last."""
  s, last = zipf(mu, row)
  rank = np.empty(len(row))
  rank[np.argsort(-np.float64(row), kind="stable")] = np.arange(1, len(row) + 1)
  return np.abs(rank - last) <= precision * last * (1 + 1 / abs(s - 1)) / min(s, 1)
