"""A ladder of score functions: how much of attention is the dot product.

All of them go into the same causal softmax. Legend: B rows, N tokens, H heads, d channels a head, m hidden units of an
MLP. A function gives scores (B, H, N, N) of queries and keys (B, N, H, d); learned parameters belong to one head each.
"""

import math

import torch
from torch import nn
from transformers import initialization as init


class Score(nn.Module):
    """Base class. `reads_content` says whether queries and keys are looked at.

    Args:
        longest: tokens of the longest row.
    """

    reads_content = True

    def __init__(self, heads: int, d: int, longest: int):
        super().__init__()
        self.d, self.longest = d, longest

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def init_weights(self) -> None:
        """Give parameters their first values."""

    def pair_flops(self) -> int:
        """FLOPs of a pair of tokens in a head."""
        return 2 * self.d

    def token_flops(self) -> int:
        """FLOPs of a token in all heads, before pairs: of every matrix (heads, d, d) there is."""
        return sum(2 * matrix.numel() for matrix in self.parameters() if matrix.dim() == 3)


class Dot(Score):
    """q . k / sqrt(d) (Vaswani et al. 2017, arXiv 1706.03762)."""

    def forward(self, query, key):
        return torch.einsum("bihc,bjhc->bhij", query, key) / math.sqrt(self.d)


class Bilinear(Score):
    """q M k / sqrt(d), M learned and at first 1 ("general" of Luong et al. 2015, arXiv 1508.04025).

    With projections before it, the same functions as `Dot` by other parameters.
    """

    def __init__(self, heads, d, longest):
        super().__init__(heads, d, longest)
        self.matrix = nn.Parameter(torch.empty(heads, d, d))

    def forward(self, query, key):
        return torch.einsum("bihc,hce,bjhe->bhij", query, self.matrix, key) / math.sqrt(self.d)

    def init_weights(self):
        init.copy_(self.matrix, torch.eye(self.d).expand_as(self.matrix))


class Distance(Score):
    """-|q - k|^2 / sqrt(d) (Kim et al. 2021, arXiv 2006.04710)."""

    def forward(self, query, key):
        products = torch.einsum("bihc,bjhc->bhij", query, key)
        squares = [x.square().sum(-1).transpose(1, 2) for x in (query, key)]  # (B, H, N)
        return (2 * products - squares[0][..., None] - squares[1][:, :, None]) / math.sqrt(self.d)


class Additive(Score):
    """w . tanh(q + k), w learned (Bahdanau et al. 2015, arXiv 1409.0473)."""

    def __init__(self, heads, d, longest):
        super().__init__(heads, d, longest)
        self.vector = nn.Parameter(torch.empty(heads, d))

    def forward(self, query, key):
        sums = query.transpose(1, 2)[:, :, :, None] + key.transpose(1, 2)[:, :, None]  # (B, H, N, N, d)
        return torch.einsum("bhijc,hc->bhij", sums.tanh(), self.vector)

    def init_weights(self):
        init.normal_(self.vector, std=1 / math.sqrt(self.d))

    def pair_flops(self):
        return 4 * self.d


class Mlp(Score):
    """w . relu(A q + C k + b), all learned: one hidden layer of m = d units over query and key."""

    def __init__(self, heads, d, longest):
        super().__init__(heads, d, longest)
        self.of_query, self.of_key = (nn.Parameter(torch.empty(heads, d, d)) for _ in range(2))
        self.bias, self.vector = (nn.Parameter(torch.empty(heads, d)) for _ in range(2))

    def forward(self, query, key):
        query = torch.einsum("bihc,hcm->bhim", query, self.of_query) + self.bias[:, None]
        key = torch.einsum("bjhc,hcm->bhjm", key, self.of_key)
        hidden = (query[:, :, :, None] + key[:, :, None]).relu()  # (B, H, N, N, m)
        return torch.einsum("bhijm,hm->bhij", hidden, self.vector)

    def init_weights(self):
        for parameter in (self.of_query, self.of_key, self.vector):
            init.normal_(parameter, std=1 / math.sqrt(self.d))
        init.zeros_(self.bias)

    def pair_flops(self):
        return 4 * self.d


class Position(Score):
    """A learned number for each lag i - j: a Toeplitz matrix, but for the sum of each row."""

    reads_content = False

    def __init__(self, heads, d, longest):
        super().__init__(heads, d, longest)
        self.lags = nn.Parameter(torch.empty(heads, longest))

    def forward(self, query, key):
        N = query.shape[1]
        if N > self.longest:
            raise ValueError(f"There are lags for {self.longest} tokens, not for {N}: raise `max_position_embeddings`.")
        places = torch.arange(N, device=query.device)
        return self.lags[:, (places[:, None] - places).clamp(min=0)].expand(query.shape[0], -1, -1, -1)

    def init_weights(self):
        init.zeros_(self.lags)

    def pair_flops(self):
        return 0


SCORES = {
    "dot": Dot,
    "additive": Additive,
    "bilinear": Bilinear,
    "distance": Distance,
    "mlp": Mlp,
    "position": Position,
}
