"""What every rank does in the tensor-parallel kernel tests; run by ``test_tensor_parallel.py``
under torchrun with TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ovr_kernels import fused, reference
from ovr_kernels.objective import PolicyObjective

ROWS, VOCAB, WIDTH = 24, 1200, 24


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).half()
    weight = (torch.randn(VOCAB, WIDTH, generator=generator) / WIDTH**0.5 * 3).half()
    targets = (torch.arange(ROWS) * 53) % VOCAB
    advantages = torch.randn(ROWS, generator=generator)
    objective = PolicyObjective(entropy_coef=0.02)
    shard = slice(rank * VOCAB // world, (rank + 1) * VOCAB // world)

    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    wanted, statistics = reference.linear_policy_loss(
        x, w, targets, objective, advantages=advantages, temperature=0.8
    )
    wanted.backward()
    kinds: list[torch.dtype] = []
    real = dist.all_reduce

    def spy(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        kinds.append(tensor.dtype)
        return real(tensor, *arguments, **options)

    dist.all_reduce = spy
    for operators, logits in ((fused, None), (reference, 2**20), (reference, 1000)):
        if logits is not None:  # with 1,000 a chunk's rows meet the shard in blocks
            reference.CHUNK_LOGITS = logits
        own = hidden.clone().requires_grad_()
        part = weight[shard].clone().requires_grad_()
        loss, found = operators.linear_policy_loss(
            own,
            part,
            targets,
            objective,
            advantages=advantages,
            temperature=0.8,
            tp_group=dist.group.WORLD,
            chunk=10,
        )
        loss.backward()
        torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found.logprobs.double(), statistics.logprobs, rtol=1e-5, atol=1e-5
        )
        assert set(kinds) == {torch.float32}, kinds  # the hidden gradient too
        for mine, whole in ((own.grad, x.grad), (part.grad, w.grad[shard])):
            error = float((mine.double() - whole).norm() / whole.norm())
            assert error <= 3e-3, (operators.__name__, error)
        logprobs, entropies = operators.linear_logprob(
            hidden,
            weight[shard],
            targets,
            temperature=0.8,
            tp_group=dist.group.WORLD,
            return_entropy=True,
        )
        torch.testing.assert_close(logprobs.double(), statistics.logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropies.double(), statistics.entropies, rtol=1e-5, atol=1e-5)
        check_cross_entropy(operators, hidden, weight, targets, shard)
    dist.barrier()
    dist.destroy_process_group()


def check_cross_entropy(
    operators: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, shard: slice
) -> None:
    """With everything that looks at the whole vocabulary."""
    bias = torch.linspace(-1, 1, VOCAB).half()
    settings = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 4.0, "reduction": "mean"}
    exact = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    wanted, _ = reference.linear_cross_entropy(*exact[:2], targets, bias=exact[2], **settings)
    wanted.backward()
    own = [t.clone().requires_grad_() for t in (hidden, weight[shard], bias[shard])]
    loss, _ = operators.linear_cross_entropy(
        *own[:2], targets, bias=own[2], tp_group=dist.group.WORLD, **settings
    )
    loss.backward()
    torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-5, atol=1e-5)
    for mine, whole, part in zip(own, exact, (slice(None), shard, shard), strict=True):
        error = float((mine.grad.double() - whole.grad[part]).norm() / whole.grad[part].norm())
        assert error <= 3e-3, (operators.__name__, mine.shape, error)


if __name__ == "__main__":
    main()
