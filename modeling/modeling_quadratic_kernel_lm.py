"""QuadraticKernelLM: causal attention whose weights are squares of scores, with a generation state of constant size."""

import math
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin

from ordnung.configuration.configuration_quadratic_kernel_lm import QuadraticKernelLMConfig
from ordnung.modeling.backbone import BackboneModel, BackbonePreTrainedModel
from ordnung.modeling.heads import (
    ForCausalLM,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from ordnung.modeling.mixers.mixer import Mixer, linear_flops
from ordnung.modeling.mixers.norms import RMSNorm
from ordnung.modeling.mixers.projections import angles_of, input_projection, output_projection, rotate
from ordnung.modeling.mixers.rows import over_rows
from ordnung.modeling.mixers.state import RecurrentStateLayer
from ordnung.modeling.ops.causal_conv import causal_conv
from ordnung.modeling.ops.grouped import per_query_head
from ordnung.modeling.ops.quadratic_kernel import Kernel, centre, quadratic_kernel, score_excess
from ordnung.modeling.ops.quadratic_sweep import Split, steps
from ordnung.modeling.ops.sliding_window import last_tokens, sliding_window_attention
from ordnung.modeling.ops.symmetric_square import num_features

SCORE_BOUND = 4.0
FIXED_KERNELS = {"taylor": Kernel(2**-0.5, 2**-0.5, 0.5), "square": Kernel(1.0, 0.0, 0.0)}


class QuadraticKernelCacheLayer(RecurrentStateLayer):
    """Generation state: what `QuadraticKernelAttention.state_shapes` names, in that order."""

    _layer_type = "quadratic_kernel"


class QuadraticKernelAttention(Mixer):
    """Causal attention with a squared kernel in place of the exponential (`ops.quadratic_kernel`).

    head = sum of w v / sum of w,   w = ((alpha z + beta)^2 + gamma) exp(G[i] - G[j]),   z = q . k / sqrt(d)

    with queries and keys of their own size d = `head_dim`, and values of e = `v_head_dim`, D / H by default. "shifted"
    with centring is CSQ (Lee 2026, Zenodo 10.5281/zenodo.18842724), "taylor" the kernel of Based (Arora et al. 2024,
    arXiv 2402.18668, section 4.1), "square" a symmetric power of two (Buckman et al. 2024, "Symmetric Power
    Transformers", manifestai.com). The gate is a number for each token and head, as in Mamba-2 (Dao and Gu 2024, arXiv
    2405.21060). A window is softmax attention.

    Training and prefill O(N d^2 e) a head, and so O(N d^3) for values of size d: linear in N and not O(d^2), which is
    the number of parameters that scores have and not a running time. Below about d^2 tokens softmax attention is
    cheaper. Decoding O(d^2 e) a token and head, state (d + 1)(d + 2) / 2 rows of e + 1 a head, in float32.
    """

    layer_type = "quadratic_kernel"
    cache_layer = QuadraticKernelCacheLayer

    def __init__(self, config: QuadraticKernelLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.value_dim = config.v_head_dim
        self.num_key_value_groups = heads // groups  # query heads that a key head serves
        self.sizes = [heads * d, groups * d, groups * self.value_dim]  # of a token's queries, keys and values
        self.q_proj, self.k_proj, self.v_proj = (input_projection(config, size) for size in self.sizes)
        self.out_proj = output_projection(config, heads * self.value_dim)
        if config.kernel == "shifted":
            self.alpha, self.beta = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(d, config.layer_norm_eps) for _ in range(2))
        if config.decay_gate:
            self.decay_proj = nn.Linear(config.hidden_size, heads, bias=False)
            self.decay_bias = nn.Parameter(torch.empty(heads))  # how long a head remembers, whatever biases there are
        if config.short_conv_kernel:
            # lag-major: column 0 weighs the current token
            self.conv_kernel = nn.Parameter(torch.empty(sum(self.sizes), config.short_conv_kernel))
        if config.sliding_window is not None:
            self.window_logits = nn.Parameter(torch.empty(heads))
        self.excess: tuple[torch.Tensor, torch.Tensor] | None = None  # what `score_excess` gave in this forward pass

    def init_weights(self, std: float) -> None:
        config = self.config
        if config.kernel == "shifted":
            init.constant_(self.alpha, 0.5)
            init.constant_(self.beta, 1.0)
        if config.decay_gate:
            # at first a head forgets in 16 tokens and others in more, up to the trained length
            longest = max(16, config.max_position_embeddings)
            tau = torch.logspace(math.log10(16), math.log10(longest), config.num_attention_heads)
            init.copy_(self.decay_bias, -torch.expm1(1 / tau).log().to(self.decay_bias))
        if config.short_conv_kernel:
            # each channel as it is, a little of the tokens before
            taps = std * torch.randn_like(self.conv_kernel)
            taps[:, 0] += 1
            init.copy_(self.conv_kernel, taps)  # as a whole: it may have been loaded
        if config.sliding_window is not None:
            init.zeros_(self.window_logits)

    def forward(
        self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, rows=None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        layer = None if past_key_values is None else self.state_of(past_key_values)
        if layer is not None and layer.state is not None:
            self.check_state(layer.state)
        self.excess = None

        def mix(*inputs):
            *tokens, lengths = inputs
            if layer is None:
                return self.run(None, tokens, lengths)[0]
            before = self.empty_state(tokens[0]) if layer.state is None else layer.state
            output, after = self.run(layer.state, tokens, lengths, return_state=True)
            layer.update_state(before, after, self.advance, tuple(tokens), None if rows is None else rows.real)
            return output

        mixed = over_rows(rows, mix, *self.project(hidden_states, position_embeddings))
        return self.out_proj(mixed.flatten(2)), None

    def project(self, hidden_states, position_embeddings) -> list[torch.Tensor]:
        """What is made of each token by itself, (B, N, .): q, k and v; log decays; cosines and sines."""
        tokens = [torch.cat([project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)]
        if self.config.decay_gate:
            gate = self.decay_proj(hidden_states)
            tokens.append(nn.functional.logsigmoid(gate.to(at_least_float32(gate)) + self.decay_bias))
        for x in position_embeddings or ():
            tokens.append(x.expand(hidden_states.shape[0], -1, -1))
        return tokens

    def run(self, state, tokens, lengths=None, return_state=False, value=None, chunk_size=None):
        """Mixes rows of tokens.

        Args:
            state: what `state_shapes` names, or None at the beginning.
            tokens: what `project` gives, (R, N, .) each.
            lengths: (R,) real tokens of each row, which come first; None if all are.
            return_state: whether to make the state after them.
            value: (R, N, H, .) to mix in place of the values.
            chunk_size: that of the config if None.

        Returns:
            (R, N, H, e), and the new state or None.
        """
        config, groups = self.config, self.num_key_value_groups
        chunk_size = chunk_size or config.chunk_size
        joined, *others = tokens
        decay = others.pop(0) if config.decay_gate else None
        past = dict(zip(self.state_shapes(), self.empty_state(joined) if state is None else state))
        after = {}
        if config.short_conv_kernel:
            after["conv"] = last_tokens(past["conv"], joined, lengths) if return_state else None
            # each channel has its own few taps, for which the block products of other implementations are too much
            kernel = self.conv_kernel.to(joined.dtype)
            joined = causal_conv(joined, kernel, state=past["conv"].to(joined.dtype), implementation="conv1d")
        dims = config.head_dim, config.head_dim, self.value_dim
        # (R, N, H, d), (R, N, G, d), (R, N, G, e)
        query, key, values = (x.unflatten(-1, (-1, n)) for x, n in zip(joined.split(self.sizes, dim=-1), dims))
        if config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        angles = [x.to(query.dtype) for x in angles_of(others)]
        local = None if config.sliding_window is None else self.turn(query, key, angles)
        if config.centering is not None:
            query, after["q_total"] = centre(query, config.centering, past["q_total"], past["count"], lengths)
            key, after["k_total"] = centre(key, config.centering, past["k_total"], past["count"], lengths)
        query, key = self.turn(query, key, angles)
        key = per_query_head(key, groups, dim=2)
        if self.training and config.score_bound_coef and torch.is_grad_enabled():
            excess = score_excess(query, key, SCORE_BOUND, chunk_size, lengths)
            self.excess = excess if self.excess is None else tuple(map(sum, zip(self.excess, excess)))

        value = per_query_head(values, groups, dim=2) if value is None else value
        sums = None if state is None else past["sums"]  # which would be zero, and take features to find out
        mixed, after["sums"] = quadratic_kernel(
            query, key, value, self.kernel(), decay, sums, lengths, chunk_size, return_state
        )
        if local is not None:
            seen = None
            if state is not None:
                seen = (*(per_query_head(past[name], groups, dim=2) for name in ("keys", "values")), past["count"])
            dropout = config.attention_dropout if self.training else 0.0
            near = local[0], per_query_head(local[1], groups, dim=2)
            beside = sliding_window_attention(*near, value, config.sliding_window, seen, dropout)
            mixed = torch.lerp(mixed, beside, self.window_logits.sigmoid()[:, None].to(mixed.dtype))
            if return_state:
                after["keys"] = last_tokens(past["keys"], local[1], lengths)
                after["values"] = last_tokens(past["values"], values, lengths)
        if "count" in past:
            after["count"] = past["count"] + (joined.shape[1] if lengths is None else lengths)
        return mixed, tuple(after[name] for name in past) if return_state else None

    @staticmethod
    def turn(query, key, angles) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys turned by their positions, or as they are without such."""
        return (rotate(query, *angles), rotate(key, *angles)) if angles else (query, key)

    def advance(self, state, *inputs) -> tuple[torch.Tensor, ...]:
        """The state after more tokens; the last of `inputs` is their `lengths`."""
        *tokens, lengths = inputs
        return self.run(state, tokens, lengths, return_state=True)[1]

    def kernel(self) -> Kernel:
        return FIXED_KERNELS.get(self.config.kernel) or Kernel(self.alpha, self.beta)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """What the state of a row holds: name -> shape."""
        config, d = self.config, self.config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        shapes = {"sums": (heads, self.value_dim + 1, num_features(d + 1))}
        if config.short_conv_kernel:
            shapes["conv"] = (config.short_conv_kernel - 1, sum(self.sizes))
        if config.centering is not None:
            shapes["q_total"], shapes["k_total"] = (heads, d), (groups, d)
        if config.sliding_window is not None:
            shapes["keys"] = (config.sliding_window - 1, groups, d)
            shapes["values"] = (config.sliding_window - 1, groups, self.value_dim)
        if config.centering is not None or config.sliding_window is not None:
            shapes["count"] = ()  # of the tokens of each row
        return shapes

    def empty_state(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The state before the first token, for tokens like `like` (R, N, .)."""
        dtypes = dict.fromkeys(("sums", "q_total", "k_total"), at_least_float32(like)) | {"count": torch.long}
        return tuple(
            like.new_zeros((), dtype=dtypes.get(name, like.dtype)).expand(like.shape[0], *shape)
            for name, shape in self.state_shapes().items()
        )

    def check_state(self, state: tuple[torch.Tensor, ...]) -> None:
        """
        Raises:
            ValueError: the state is that of a model with another configuration.
        """
        expected, held = list(self.state_shapes().values()), [tuple(x.shape[1:]) for x in state]
        if held != expected:
            raise ValueError(
                f"`past_key_values` holds a state of shapes {held} for layer {self.layer_idx}, but this model's "
                f"`head_dim`, `centering`, `short_conv_kernel` and `sliding_window` need {expected} "
                f"({', '.join(self.state_shapes())}): continue with the model that made it, or start anew with "
                "`DynamicCache(config=model.config)`."
            )

    def mixing_weights(self, hidden_states, position_embeddings=None, rows=None, **kwargs) -> torch.Tensor:
        """(B, H, N, N) weights of the values, as they are after the convolution; a row of them sums to one."""
        B, N = hidden_states.shape[:2]
        places = torch.eye(N, dtype=hidden_states.dtype, device=hidden_states.device).expand(B, N, N)

        def weigh(*inputs):
            *tokens, places, lengths = inputs
            value = places[:, :, None].expand(-1, -1, self.config.num_attention_heads, -1)
            return self.run(None, tokens, lengths, value=value, chunk_size=2 * N)[0]  # one block, of pairs alone

        weights = over_rows(rows, weigh, *self.project(hidden_states, position_embeddings), places)
        if rows is not None and rows.real is not None:
            weights = weights * rows.real[:, :, None, None]
        return weights.transpose(1, 2)

    def flops(self, seq_len: int) -> int:
        config, N, d, e = self.config, seq_len, self.config.head_dim, self.value_dim + 1
        inside = across = 0  # pairs of a block's tokens with those they see, later ones too; features made and read
        for entering, block in steps(N, Split.of(N, d, config.chunk_size, config.decay_gate), return_state=False):
            size = block.stop - block.start
            inside += size * (block.stop - block.near)
            across += (size if block.near else 0) + (entering.stop - entering.start if entering else 0)
        mixing = 2 * inside * (d + 1 + e) + 2 * across * num_features(d + 1) * e
        if config.sliding_window is not None:
            block = min(config.sliding_window, N)
            mixing += 2 * -(-N // block) * block * (config.sliding_window - 1 + block) * (d + self.value_dim)
        total = linear_flops(self) * N + config.num_attention_heads * mixing
        return total + 2 * config.short_conv_kernel * sum(self.sizes) * N

    def cache_bytes(self, seq_len: int, itemsize: int) -> int:
        sizes = {name: math.prod(shape) for name, shape in self.state_shapes().items() if name != "count"}
        wide = ("sums", "q_total", "k_total")
        return sum(size * (max(itemsize, 4) if name in wide else itemsize) for name, size in sizes.items())


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class QuadraticKernelLMPreTrainedModel(BackbonePreTrainedModel):
    config: QuadraticKernelLMConfig
    _no_weight_decay = ("conv_kernel",)

    @property
    def loss_function(self):
        """That of transformers; in training with `score_bound_coef`, and what it adds."""
        function = super().loss_function
        return partial(self.bounded_loss, function) if self.training and self.config.score_bound_coef else function

    @loss_function.setter
    def loss_function(self, function):
        self._loss_function = function

    def bounded_loss(self, function, *args, **kwargs):
        """`function(*args, **kwargs)`, and `score_bound_coef` times the mean excess of the scores of all layers.

        Raises:
            RuntimeError: the layers ran without gradients, as in reentrant checkpointing.
        """
        loss = function(*args, **kwargs)
        mixers = [x for x in self.modules() if isinstance(x, QuadraticKernelAttention)]
        excess = [mixer.excess for mixer in mixers if mixer.excess is not None]
        for mixer in mixers:
            mixer.excess = None  # it holds the graph
        if not torch.is_grad_enabled() or not mixers:
            return loss
        if not excess:
            raise RuntimeError(
                f"`score_bound_coef` ({self.config.score_bound_coef}) needs the gradients of scores, and the layers "
                "ran without: call gradient_checkpointing_enable({'use_reentrant': False}), or set it to 0."
            )
        total, pairs = (sum(x.to(loss) for x in each) for each in zip(*excess))
        items = kwargs.get("num_items_in_batch")
        if items is not None:  # the loss is this batch's part of a mean over several, which Trainer adds up
            targets = kwargs.get("shift_labels")
            targets = kwargs["labels"][..., 1:] if targets is None else targets
            total = total * (targets != -100).sum() / items
        return loss + self.config.score_bound_coef * total / pairs


class QuadraticKernelLMModel(QuadraticKernelLMPreTrainedModel, BackboneModel):
    """The stack without a head."""


class QuadraticKernelLMForCausalLM(QuadraticKernelLMPreTrainedModel, ForCausalLM, GenerationMixin):
    model_class = QuadraticKernelLMModel


class QuadraticKernelLMForSequenceClassification(QuadraticKernelLMPreTrainedModel, ForSequenceClassification):
    model_class = QuadraticKernelLMModel


class QuadraticKernelLMForTokenClassification(QuadraticKernelLMPreTrainedModel, ForTokenClassification):
    model_class = QuadraticKernelLMModel


class QuadraticKernelLMForQuestionAnswering(QuadraticKernelLMPreTrainedModel, ForQuestionAnswering):
    model_class = QuadraticKernelLMModel


__all__ = [
    "QuadraticKernelLMForCausalLM",
    "QuadraticKernelLMForQuestionAnswering",
    "QuadraticKernelLMForSequenceClassification",
    "QuadraticKernelLMForTokenClassification",
    "QuadraticKernelLMModel",
    "QuadraticKernelLMPreTrainedModel",
]
