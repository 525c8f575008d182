"""The training step with networks in bfloat16: what is bfloat16, what stays float32, and how far gradients move."""

import pytest
import torch

from tests.checks import relative_error
from tests.small_step import small_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gradients() -> dict[torch.dtype, tuple[dict[str, torch.Tensor], set[torch.dtype]]]:
    """Gradients, and the dtypes that the flow network's convolutions computed in, by the policy's dtype."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        golden = small_step()
        if dtype != torch.float32:
            frozen = [p for p in golden.policy.network.parameters() if not p.requires_grad]
            for tensor in (*frozen, *golden.policy.network.buffers(), *golden.policy.conditions.buffers()):
                tensor.data = tensor.data.to(dtype)
            golden.policy.dtype = dtype
        computed = set()
        golden.flow.unet.conv_in.register_forward_hook(lambda *call, seen=computed: seen.add(call[2].dtype))
        golden.step(4)(golden.transitions)
        results[dtype] = golden.gradients(), computed
    return results


def test_the_flow_computes_in_bfloat16_where_the_policy_does(gradients) -> None:
    assert gradients[torch.float32][1] == {torch.float32}
    assert gradients[torch.bfloat16][1] == {torch.bfloat16}


def test_gradients_are_float32_and_near(gradients) -> None:
    """bfloat16 has 8 bits; through two networks and their derivatives, the whole gradient stays within a fifth."""
    expected, actual = gradients[torch.float32][0], gradients[torch.bfloat16][0]
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
    for part in ("lora", "flow"):
        names = [name for name in expected if name.startswith(f"grad.{part}")]
        joined = [torch.cat([source[name].flatten() for name in names]) for source in (actual, expected)]
        assert relative_error(*joined) < 0.2
