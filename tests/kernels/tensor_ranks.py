"""What every rank does in the tensor-parallel kernel tests; run by ``test_tensor_parallel.py``
under torchrun with TRITON_INTERPRET=1."""

from __future__ import annotations

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
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)

    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    wanted, statistics = reference.linear_policy_loss(
        x, w, targets, objective, advantages=advantages, temperature=0.8
    )
    wanted.backward()
    for operators in (fused, reference):
        for sequence_parallel in (False, True):
            own = hidden[share if sequence_parallel else slice(None)].clone().requires_grad_()
            part = weight[shard].clone().requires_grad_()
            loss, found = operators.linear_policy_loss(
                own,
                part,
                targets,
                objective,
                advantages=advantages,
                temperature=0.8,
                tp_group=dist.group.WORLD,
                sequence_parallel=sequence_parallel,
                chunk=10,
            )
            loss.backward()
            torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                found.logprobs.double(), statistics.logprobs, rtol=1e-5, atol=1e-5
            )
            for mine, whole in (
                (own.grad, x.grad[share] if sequence_parallel else x.grad),
                (part.grad, w.grad[shard]),
            ):
                error = float((mine.double() - whole).norm() / whole.norm())
                assert error <= 3e-3, (operators.__name__, sequence_parallel, error)
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
    # The weight of a norm whose rows are spread over the ranks.
    scale = torch.ones(WIDTH, requires_grad=True)
    fused.rms_norm(hidden[share].float(), scale, 1e-6, group=dist.group.WORLD).sum().backward()
    alone = torch.ones(WIDTH, requires_grad=True)
    reference.rms_norm(hidden.float(), alone, 1e-6).sum().backward()
    torch.testing.assert_close(scale.grad, alone.grad)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
