"""The divergence of next-token predictions, in pieces: for all tokens, only logits and their gradient are held."""

import torch
import torch.nn.functional as F

PIECE = 2**20  # logits that are computed with at once


class Divergence(torch.autograd.Function):
    """T^2 times the Kullback-Leibler divergence from the teacher, summed over tokens; its gradient is made with it.

    With p the teacher's and q the student's predictions at temperature T, the gradient in the student's logits is
    T (q - p). In one piece, a vocabulary of 49,152 would hold some ten tensors of 200 MB for 1,024 tokens.
    """

    @staticmethod
    def forward(ctx, logits, wanted, weights, temperature):
        """logits, wanted (n, V): the student's and the teacher's; weights (n,) of the tokens."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=logits.device)
        # the gradient is not scaled yet: too small for half precision
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=kept)
        rows = max(1, PIECE // logits.shape[1])
        for start in range(0, len(logits), rows):
            piece = slice(start, start + rows)
            log_q, log_p = (F.log_softmax(x[piece].to(exact) / temperature, dim=-1) for x in (logits, wanted))
            p, weight = log_p.exp(), weights[piece, None]
            total += temperature**2 * (weight * p * (log_p - log_q)).sum()
            gradient[piece] = temperature * weight * (log_q.exp() - p)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient_of_total):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradient_of_total), None, None, None  # in place: none asks twice


def divergence(
    logits: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 KL(teacher || student), summed over real tokens (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        logits: (B, N, V), the student's, which gets a gradient.
        wanted: (B, N, V), the teacher's, which gets none.
        real: (B, N), which tokens are no padding.
        temperature: T, of both.
    """
    return Divergence.apply(logits.flatten(0, 1), wanted.flatten(0, 1), real.flatten().float(), temperature)
