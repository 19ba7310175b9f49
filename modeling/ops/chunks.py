"""Long inputs a piece at a time, on a CPU and where no gradient needs the intermediate results.

The intermediate results of a piece stay in the caches, and their memory serves the next piece. Those of a whole long
input are fetched from the system, zeroed, and given back, at every step of every layer.
"""

import torch

ELEMENTS = 1024 * 512  # of states in a piece: tokens, of all sequences together, times width


def is_graph():
    """Whether a graph for other inputs is being made, by `torch.export` or `torch.jit.trace`."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def piece_tokens(x):
    """Tokens of `x` (B, N, D) in a piece."""
    return max(1, ELEMENTS // x.shape[2])


def pieces_pay(x):
    """Whether to compute `x` (B, N, D) in pieces."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # a graph must not depend on the size
    return x.device.type == "cpu" and x.shape[0] * x.shape[1] > piece_tokens(x)


WHOLE = slice(None), slice(None)


def pieces(x, multiple=1):
    """What to compute of `x` (B, N, D) at a time: some whole sequences, or some tokens of one; slices of both.

    A part of a sequence that is not its last is a multiple of `multiple` tokens. Slices of all are `WHOLE`.
    """
    if not pieces_pay(x):
        return [WHOLE]
    B, N = x.shape[:2]
    rows, tokens = max(1, piece_tokens(x) // N), max(1, piece_tokens(x) // multiple) * multiple
    return [(slice(b, b + rows), slice(t, t + tokens)) for b in range(0, B, rows) for t in range(0, N, tokens)]


def in_pieces(function, *inputs):
    """`function` of inputs (B, N, D), for one that treats each token by itself and keeps the shape."""
    places = pieces(inputs[0])
    if len(places) == 1:
        return function(*inputs)
    output = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    for place in places:
        output[place] = function(*(x[place] for x in inputs))
    return output
