import subprocess
import sys

import torch
from fastdino_kernels.normalize_weight import _forward
from fastdino_kernels.operators import operator


def test_operators_are_those_of_torch() -> None:
    assert isinstance(_forward, torch._ops.OpOverload)
    assert torch.Tag.pt2_compliant_tag in _forward.tags


def test_an_operator_has_gradients_and_compiles_whole() -> None:
    @operator("fastdino_test::cube")
    def cube(x: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * x.detach() ** 3

    @torch.library.register_fake(cube)
    def _(x: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.empty_like(x)

    torch.library.register_autograd(
        cube,
        lambda ctx, grad: (3 * ctx.scale * ctx.saved_tensors[0] ** 2 * grad, None),
        setup_context=lambda ctx, inputs, output: (
            ctx.save_for_backward(inputs[0]),
            setattr(ctx, "scale", inputs[1]),
        ),
    )
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    torch.library.opcheck(cube, (x, 2.0))
    y = torch.compile(lambda x: cube(x, 2.0) + 1, backend="eager", fullgraph=True)(x)
    y.sum().backward()
    assert y.tolist() == [3.0, -15.0] and x.grad is not None and x.grad.tolist() == [6.0, 24.0]


def test_a_step_does_not_import_the_compiler() -> None:
    script = """
import sys, torch
from fastdino_kernels import AdamWEMA, normalize_weight, prototype_loss
v, z = torch.randn(64, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
w = normalize_weight(v, torch.ones(64, 1))
loss = prototype_loss(z, w, z.detach(), w.detach(), torch.zeros(64), student_temp=0.1, teacher_temp=0.04).loss
loss.backward()
AdamWEMA([v]).step(momentum=1.0)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
