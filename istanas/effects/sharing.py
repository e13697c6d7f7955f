"""What an operation has in common wherever it stands: a prior that shares measurements between decisions.

A convolution that is good on one edge is probably good on another one, too. With effects that are independent in the
prior, the measurements must show this for each decision anew. The prior here is

    z = own + shared of the candidate's operation,    own ~ N(0, tau^2 I),  shared ~ N(0, r tau^2 I),

that is, z ~ N(0, tau^2 (I + r O O^T)), where O (N, operations) says which operation a candidate has. The ratio r is
chosen by the marginal likelihood, so that nothing is shared where operations have nothing in common. With z = L v and
L L^T = I + r O O^T, this is the ridge for v with the columns A L.

Source: Gelman, Hill, Data Analysis Using Regression and Multilevel/Hierarchical Models, 2007, chapter 12.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from istanas.effects.coding import Array, layout
from istanas.effects.posterior import Posterior
from istanas.space.base import SearchSpace

RATIOS = (0.0, 0.25, 1.0, 4.0, 16.0)
"""The ratios r among which the marginal likelihood chooses."""


def operations(space: SearchSpace) -> Array:
    """Return O, which has a 1 where a candidate (row) is an operation (column), (N, operations).

    Example:
        >>> from istanas.space import NasBench201Space
        >>> operations(NasBench201Space()).sum(0)  # each operation stands on each of 6 edges
        array([6., 6., 6., 6., 6.])
    """
    names = [name for decision in layout(space).decisions for name, _ in decision.candidates]
    columns = {name: column for column, name in enumerate(dict.fromkeys(names))}
    found = np.zeros((len(names), len(columns)))
    found[np.arange(len(names)), [columns[name] for name in names]] = 1.0
    return found


def prior_root(space: SearchSpace, ratio: float) -> Array:
    """Return L = (I + r O O^T)^(1/2), (N, N), symmetric.

    Candidates of different operations are independent. For the n candidates of one operation, L is
    I + (sqrt(1 + r n) - 1) / n 1 1^T.

    Args:
        space: The search space.
        ratio: r >= 0.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> L = prior_root(NasBench201Space(), 4.0)
        >>> (L @ L)[0, [0, 5, 1]].round(12).tolist()  # itself, the same operation elsewhere, another operation
        [5.0, 4.0, 0.0]
    """
    members = operations(space)
    n = members.sum(0)
    return np.asarray(np.eye(len(members)) + (members * ((np.sqrt(1.0 + ratio * n) - 1.0) / n)) @ members.T)


def unrooted(posterior: Posterior, root: Array) -> Posterior:
    """Return the posterior of z = L v from that of v.

    Args:
        posterior: The posterior of v.
        root: L, (N, N).
    """
    return replace(
        posterior,
        prior_variance=posterior.prior_variance * float(np.square(root).sum(1).mean()),
        mean=root @ posterior.mean,
        covariance=root @ posterior.covariance @ root.T,
        draws=posterior.draws @ root.T,
    )
