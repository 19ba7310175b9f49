import pytest
from family_tester import FamilyTester
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.skip("SparseAttentionLM is not registered yet: its tests are not all passed", allow_module_level=True)


class TestSparseAttentionLM(FamilyTester):
    model_type = "sparse_attention_lm"
    variants = {
        "default": {"sliding_window": 5, "num_global_tokens": 2},
        "local": {"sliding_window": [3, 5, 64], "num_global_tokens": 0, "position_embedding_type": "none"},
        "strided": {"sliding_window": 4, "num_global_tokens": [0, 1, 2], "global_stride": [None, 5, 3]},
        "random": {
            "sliding_window": 6,
            "num_global_tokens": 0,
            "num_random_blocks": 2,
            "random_block_size": 4,
            "position_embedding_type": "learned",
            "norm_position": "post",
        },
        "all": {
            "sliding_window": 4,
            "num_global_tokens": 3,
            "global_stride": 4,
            "num_random_blocks": 1,
            "random_block_size": 3,
            "num_key_value_heads": 2,
            "qk_norm": True,
        },
        "hybrid": {
            "sliding_window": 4,
            "layer_types": ["sparse_attention", "full_attention", "sparse_attention"],
        },
        "eager": {
            "sliding_window": 4,
            "num_random_blocks": 1,
            "random_block_size": 4,
            "attn_implementation": "eager",
        },
    }
    mixing_exponent = 1
    state_grows = False

    def count(self, module, *inputs, **arguments):
        with sdpa_kernel(SDPBackend.MATH):  # torch does not count its fused CPU kernel
            return super().count(module, *inputs, **arguments)
