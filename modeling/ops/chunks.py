"""Long inputs a piece at a time, on a CPU and where no gradient needs the intermediate results.

The intermediate results of a piece stay in the caches, and their memory serves the next piece. Those of a whole long
input are fetched from the system, zeroed, and given back, at every step of every layer.
"""

import torch

ROWS = 1024  # tokens, of all sequences together, in a piece


def pieces_pay(x):
    """Whether to compute `x` (B, N, D) in pieces."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # a graph must not depend on the size
    return x.device.type == "cpu" and x.shape[0] * x.shape[1] > ROWS


def in_pieces(function, *inputs):
    """`function` of inputs (B, N, D), for one that treats each token by itself and keeps the shape."""
    if not pieces_pay(inputs[0]):
        return function(*inputs)
    output = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    pieces = [x.flatten(0, 1).split(ROWS) for x in (output, *inputs)]
    for part, *parts in zip(*pieces):
        part.copy_(function(*parts))
    return output
