r"""What a code of some inputs says about the inputs and about their labels, estimated from a few hundred examples.

No density is estimated. With a positive definite kernel of value 1 at equal arguments, n examples have a Gram matrix K,
:math:`A = K / n` has trace 1, and (Sanchez Giraldo, Rao & Principe, IEEE Trans. Information Theory 2015, definitions 2
and 3)

.. math:: S_\alpha(A) = \frac{1}{1 - \alpha} \log_2 \sum_i \lambda_i(A)^\alpha, \qquad
   S_\alpha(A, B) = S_\alpha\!\left(\frac{A \circ B}{\mathrm{tr}(A \circ B)}\right), \qquad
   I_\alpha(A; B) = S_\alpha(A) + S_\alpha(B) - S_\alpha(A, B)

are entropy, joint entropy and mutual information, in bits, of the examples as the kernel tells them apart: S is at most
:math:`\log_2 n`, and I is between 0 and the smaller S. As alpha goes to 1, S becomes von Neumann's entropy. For classes
the kernel is 1 or 0, and S is the entropy of their frequencies (:func:`label_gram` has other labels). For vectors it is
Gaussian; its width is the median distance (Garreau, Jitkrittum & Kanagawa, arXiv 1707.07269), or whatever else is to
count as the same: I is of what differs by more than that.

Two facts to read the numbers by. A Gaussian kernel blurs, so that :math:`I(A; A)`, the most that anything can say about
A, is below :math:`S(A)`. And the estimate has a bias: from n examples a code of many dimensions seems to know labels
that were dealt out at random. So what a code says about labels is taken in excess of what it says, on average, about
permutations of them (an adjustment for chance, as in Vinh, Epps & Bailey, JMLR 2010), and then can be negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALPHA = 1.01
"""The order of all entropies: near 1, where they are Shannon's, as is usual (Yu et al., IEEE TNNLS 2021, section 3)."""


def entropy(gram: Tensor, alpha: float = ALPHA) -> Tensor:
    """Matrix-based entropy of order ``alpha`` in bits.

    Args:
        gram: positive semidefinite, shape ``(..., n, n)``; it is normalised to trace 1.
        alpha: above 0; 1 is von Neumann's.

    Returns:
        Shape ``(...)``.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    values = torch.linalg.eigvalsh(gram.double() / trace[..., None, None]).clamp(min=0)
    if alpha == 1:
        return torch.special.entr(values).sum(-1) / torch.tensor(2.0).double().log()
    return (values**alpha).sum(-1).log2() / (1 - alpha)


def mutual_information(a: Tensor, b: Tensor, alpha: float = ALPHA) -> Tensor:
    """Matrix-based mutual information in bits of two Gram matrices with ones on their diagonals, ``(..., n, n)``."""
    return entropy(a, alpha) + entropy(b, alpha) - entropy(a * b, alpha)


def squared_distances(rows: Tensor) -> Tensor:
    """Between all rows of ``(n, d)``, shape ``(n, n)``, float64."""
    rows = rows.double()
    norms = rows.square().sum(1)
    return (norms[:, None] + norms - 2 * rows @ rows.T).clamp(min=0).fill_diagonal_(0)


def median_width(distances: Tensor) -> float:
    """The median of squared distances between different examples; their mean where most examples are the same."""
    apart = distances[~torch.eye(len(distances), dtype=torch.bool)]
    if not len(apart):
        return 0.0
    median = float(apart.median())
    return median if median > 0 else float(apart.mean())


def gaussian_gram(distances: Tensor, width: float) -> Tensor:
    r""":math:`\exp(-d^2 / 2 w)` from squared distances and a squared width w; ones if nothing differs (w = 0)."""
    return torch.exp(-distances / (2 * width)) if width > 0 else torch.ones_like(distances)


def label_gram(labels: Tensor) -> Tensor:
    """The Gram matrix of labels: Gaussian for scores ``(n,)`` or ``(n, d)``, 1 or 0 for classes ``(n,)``, integers.

    Sequences of classes ``(n, length)``, such as the tokens that a language model is to predict, are alike in the share
    of the places at which they agree, padding included.

    Raises:
        ValueError: if they are none of these.
    """
    if labels.is_floating_point() and labels.dim() in (1, 2):
        distances = squared_distances(labels.reshape(len(labels), -1).cpu())
        return gaussian_gram(distances, median_width(distances))
    if labels.dim() in (1, 2):
        places = labels.reshape(len(labels), -1).cpu().double()
        return 1 - torch.cdist(places, places, p=0) / max(1, places.shape[1])
    raise ValueError(f"expected a class, a score or a row of them for each example, got shape {(*labels.shape,)}")


@dataclass(frozen=True)
class Code:
    """What the codes of one module's inputs say, for some ranks.

    Args:
        ranks: of the codes, ascending, without 0; the last code is the inputs themselves, rotated.
        about_inputs: bits about the inputs, I(X; Z_r).
        about_labels: bits about the labels in excess of chance, I(Z_r; Y) less its mean over permutations.
        by_chance: of the last code and each permutation, bits in excess of the mean over the others.
    """

    ranks: tuple[int, ...]
    about_inputs: tuple[float, ...]
    about_labels: tuple[float, ...]
    by_chance: tuple[float, ...]

    def criterion(self, beta: float) -> tuple[float, ...]:
        """I(X; Z_r) - beta I(Z_r; Y) for each rank: what is kept, less the price of what it says about the labels."""
        return tuple(x - beta * y for x, y in zip(self.about_inputs, self.about_labels, strict=True))

    def optimum(self, beta: float) -> int:
        """The rank at which the criterion is smallest; 0, where it is 0, if no code is worth what it keeps."""
        best = min(zip((0.0, *self.criterion(beta)), (0, *self.ranks), strict=True))
        return best[1]


def ranks_to_try(highest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... and the highest: no more than a third apart from one another."""
    powers = [2**k for k in range(highest.bit_length())]
    between = [3 * power // 2 for power in powers if power > 1]
    return sorted({rank for rank in (*powers, *between, highest) if 0 < rank <= highest})


def permutations_of(gram: Tensor, count: int) -> Tensor:
    """A Gram matrix with its examples in other orders, shape ``(count, n, n)``; always the same orders."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(gram), generator=generator) for _ in range(count)]
    return torch.stack([gram[order][:, order] for order in orders])


def codes_of(rows: Tensor, labels: Tensor, permuted: Tensor, alpha: float = ALPHA) -> Code | None:
    r"""What codes of growing rank say: the examples' coordinates along the first principal directions of their inputs.

    A rank-r adapter sees its inputs through r directions. Before training nobody knows which; here they are the first
    principal ones, the linear code of r numbers from which the inputs can be restored best (Eckart & Young, 1936), and
    the one that EVA starts from. A code keeps the unit and the kernel's width of the inputs, so that what it leaves out
    is lost: a width of its own would blow up whatever little is left.

    Args:
        rows: a module's inputs, one row for each example, ``(n, d)``.
        labels: their Gram matrix, ``(n, n)``.
        permuted: the same of permuted labels, ``(m, n, n)`` with m at least 2.
        alpha: the order of the entropies.

    Returns:
        ``None`` if all rows are the same.
    """
    rows = rows.detach().cpu().double()
    left, values, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    known = int((values > 1e-6 * values[0]).sum())
    distances = squared_distances((left * values)[:, :known])
    width = median_width(distances)
    if not known or width <= 0:
        return None
    ranks = ranks_to_try(known)
    grams = torch.stack([gaussian_gram(squared_distances((left * values)[:, :rank]), width) for rank in ranks])
    inputs = grams[-1]
    own = entropy(grams, alpha)
    about_inputs = own[-1] + own - entropy(grams * inputs, alpha)
    told = own + entropy(labels, alpha) - entropy(grams * labels, alpha)
    chance = torch.stack([entropy(grams * other, alpha) for other in permuted])
    chance = own + entropy(labels, alpha) - chance
    last = chance[:, -1]
    others = (last.sum() - last) / (len(last) - 1)
    return Code(
        tuple(ranks),
        tuple(about_inputs.tolist()),
        tuple((told - chance.mean(0)).tolist()),
        tuple((last - others).tolist()),
    )


def price_of_labels(codes: Sequence[Code]) -> float | None:
    r"""The multiplier beta at which all modules together are indifferent between keeping everything and nothing.

    .. math:: \beta = \sum_m I(X_m; Z_{full, m}) \, / \, \sum_m I(Z_{full, m}; Y)

    It is the slope of the chord of the information curve: the optimum under it is where the curve is farthest above
    the chord, which is what a knee is (Satopää et al., "Finding a Kneedle in a haystack", ICDCS workshops 2011).

    Returns:
        ``None`` if the inputs do not say more about the labels than about every permutation of them: then there is
        nothing to be had at any price. Labels that say nothing get past this once in m + 1 times, with m permutations.
    """
    told = sum(code.about_labels[-1] for code in codes)
    chance = [sum(column) for column in zip(*(code.by_chance for code in codes), strict=True)]
    if not codes or told <= max(0.0, *chance):
        return None
    return sum(code.about_inputs[-1] for code in codes) / told
