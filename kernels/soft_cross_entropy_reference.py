"""Plain torch twin of the fused soft-label cross entropy: the oracle of the Triton form, and what runs elsewhere.

Differentiable by autograd any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cross_entropy(
    logits: Tensor,
    *,
    prior: Tensor | None = None,
    index: Tensor | None = None,
    hard: float = 0.0,
    flat: float = 0.0,
    soft: float = 0.0,
) -> Tensor:
    """Row losses ``hard * -log p[index] + flat * sum_c -log p[c] + soft * KL(prior || p)``, ``p = softmax(logits)``.

    The gradient by the logits is ``(sum t) p - t`` with ``t = hard * one_hot(index) + flat + soft * prior``. A class
    whose t is zero counts as zero also where its logit is minus infinity.

    Args:
        logits: ``[N, C]``, any strides.
        prior: ``[N, C]`` probabilities, taken as constant; ``None`` for none.
        index: ``[N]`` classes; a row of a negative class has loss and gradient zero. ``None`` for none.
        hard: Weight of the class.
        flat: Weight of every class.
        soft: Weight of the prior.

    Returns:
        ``[N]``, float64 for float64 logits, else float32.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 4), index=torch.tensor([2]), hard=1.0).exp()
        tensor([4.])
    """
    exact = logits.dtype if logits.dtype == torch.float64 else torch.float32
    log_p = torch.log_softmax(logits.to(exact), -1)
    loss = log_p.new_zeros(log_p.shape[0])
    if index is not None and hard:
        loss = loss - hard * log_p.gather(1, index.clamp(min=0)[:, None])[:, 0]
    if flat:
        loss = loss - flat * log_p.sum(-1)
    if prior is not None and soft:
        q = prior.detach().to(exact)
        # a product of zero with minus infinity is no number, and so would be its gradient
        cross = torch.where(q > 0, q * torch.where(q > 0, log_p, 0.0), 0.0)
        loss = loss + soft * (torch.special.xlogy(q, q) - cross).sum(-1)
    return loss if index is None else torch.where(index < 0, 0.0, loss)
