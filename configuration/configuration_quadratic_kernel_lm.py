"""Configuration of QuadraticKernelLM, attention with a squared kernel and a state of constant size."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from ordnung.configuration.configuration_backbone import BackboneConfig

MAX_STATE_BYTES = 1 << 30


@strict
class QuadraticKernelLMConfig(BackboneConfig):
    """Configuration of QuadraticKernelLM. Adds to the fields of `BackboneConfig`:

    Args:
        kernel: weight of a key, as a function of its score z = q . k / sqrt(`head_dim`): "shifted" ((alpha z + beta)^2,
            alpha and beta learned for each head, from 0.5 and 1), "taylor" (1 + z + z^2 / 2) or "square" (z^2).
        centering: whether queries and keys are taken less the mean of those up to each token ("prefix"), or of those
            before it ("exclusive"), in their row; None for neither.
        qk_norm: RMS norm of queries and keys, each head by itself, before they are centred and rotated.
        decay_gate: each token leaves a learned part of the weights of all before it, for each head.
        short_conv_kernel: taps of a causal convolution of queries, keys and values, each channel by itself; 0 for none.
        sliding_window: tokens of a window, the current one included, in which softmax attention of the same heads runs
            beside the kernel; each head learns its share. None for no such attention.
        head_dim: size d of queries and keys, even. It sets the cost: features and state grow as d^2, and time as d^2
            times the size of values.
        v_head_dim: size of a head's values, `hidden_size / num_attention_heads` if None.
        chunk_size: tokens whose weights are computed pair by pair, of each token from half as many before it to all of
            these, and without a gate at most half as many; older ones are seen through the state. It changes speed and
            memory, not the result. None for 192, and for rows of up to about d^2 tokens (260, 953, 3,646 for d = 16,
            32, 64) all of them, which is faster and takes more memory.
        score_bound_coef: how much the loss grows with scores beyond 4 in size: this times the mean of the squared
            excess, over the pairs of tokens inside a chunk. In training only.

    `attention_dropout` applies to softmax attention, here that of the window. In layers of "full_attention" heads have
    `head_dim` channels all through. Grouped keys (`num_key_value_heads`) save parameters; each query head has a state
    of its own, since it has a gate of its own.

    `layer_types` takes "quadratic_kernel" and "full_attention".
    """

    model_type = "quadratic_kernel_lm"
    mixer_types: ClassVar[tuple[str, ...]] = ("quadratic_kernel", "full_attention")

    kernel: Literal["shifted", "taylor", "square"] = "shifted"
    centering: Literal["prefix", "exclusive"] | None = None
    qk_norm: bool = True
    decay_gate: bool = True
    short_conv_kernel: int = 4
    sliding_window: int | None = None
    head_dim: int = 16
    v_head_dim: int | None = None
    chunk_size: int | None = None
    score_bound_coef: float | int = 0.0

    def __post_init__(self, **kwargs):
        if self.v_head_dim is None and self.num_attention_heads > 0:
            self.v_head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def state_bytes(self) -> int:
        """Bytes of the features' part of one sequence's generation state, in float32."""
        return 4 * self.layer_types.count("quadratic_kernel") * self.state_size(self.head_dim)

    def state_size(self, head_dim: int) -> int:
        """Numbers that a layer's heads hold for queries and keys of that size."""
        features = (head_dim + 1) * ((head_dim + 1) // 2 + 1)
        return self.num_attention_heads * features * (self.v_head_dim + 1)

    def validate_kernel(self):
        heads = self.num_attention_heads
        if self.hidden_size % heads and self.v_head_dim == self.hidden_size // heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` ({heads}), so that "
                "heads have values of one size: change one, or set `v_head_dim`."
            )
        bounds = {"head_dim": 2, "v_head_dim": 1, "chunk_size": 1, "short_conv_kernel": 0, "score_bound_coef": 0}
        for name, least in bounds.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"`{name}` ({value}) must be at least {least}.")
        if self.head_dim % 2:
            raise ValueError(
                f"`head_dim` ({self.head_dim}) must be even: rope turns pairs, and some features of an odd size "
                "would be held twice."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"`sliding_window` ({self.sliding_window}) must be at least 1, the current token, or None for no "
                "window."
            )
        if not self.is_decoder:
            raise ValueError(
                "QuadraticKernelLM is causal: `is_decoder` must be True. SoftmaxLM has a bidirectional form."
            )
        if self.state_bytes > MAX_STATE_BYTES:
            layers = self.layer_types.count("quadratic_kernel")
            fits = (d for d in range(self.head_dim, 0, -2) if 4 * layers * self.state_size(d) <= MAX_STATE_BYTES)
            raise ValueError(
                f"`head_dim` ({self.head_dim}) makes the generation state of one sequence "
                f"{self.state_bytes / 2**30:.1f} GiB in {layers} layers of {self.num_attention_heads} heads, more than "
                f"1 GiB: set `head_dim` to at most {next(fits, 1)}, or take fewer such layers by `layer_types`."
            )

    @classmethod
    def csq_preset(cls, **overrides) -> "QuadraticKernelLMConfig":
        """The mechanism of Lee, "The d^2 Pullback Theorem" (Zenodo 10.5281/zenodo.18842724), section on CSQ.

        Weights (alpha z + beta)^2 of prefix-centred queries and keys, normalised over the row, with a penalty on scores
        beyond 4; no gate, convolution or norm. The source gives no values for alpha, beta and the penalty's weight, and
        its second penalty, on the rank of the scores, is left out.
        """
        source = {
            "kernel": "shifted",
            "centering": "prefix",
            "qk_norm": False,
            "decay_gate": False,
            "short_conv_kernel": 0,
            "score_bound_coef": 1e-3,
        }
        return cls(**{**source, **overrides})

    @classmethod
    def based_preset(cls, **overrides) -> "QuadraticKernelLMConfig":
        """Based (Arora et al. 2024, arXiv 2402.18668): the Taylor kernel on queries and keys of 16, beside a window.

        Each layer has both, where the source alternates layers of one kind and the other and adds gated convolutions.
        """
        source = {
            "kernel": "taylor",
            "qk_norm": False,
            "decay_gate": False,
            "short_conv_kernel": 0,
            "sliding_window": 64,
        }
        return cls(**{**source, **overrides})


__all__ = ["QuadraticKernelLMConfig"]
