"""A module's forward and backward pass as CUDA graphs: a launch each, instead of hundreds."""

import logging
import weakref
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

__all__ = ["GraphedPass", "GraphedPasses", "recordable"]

log = logging.getLogger("avalanche_memo")


def recordable(x: Tensor) -> bool:
    """Return whether work on a tensor can be recorded: on a GPU where nobody records already."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


class _Forward:
    """Lives as long as a forward pass may still have its backward pass."""


class GraphedPass:
    """What a module makes of one batch, and the gradients, recorded once to be replayed.

    Gradients are of the parameters that learn; the batch gets none. What is returned but the first
    output, which is copied, is valid until the next batch.

    :param module: returns a list of tensors; it has run before, with its gradients, in just the
        state that it has now.
    :param x: a batch, on a GPU; others must have its shape and type.
    """

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self._x = x.detach().clone()
        learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._parameters = list(learning.values())
        # Autograd's node of a parameter may be older, and then waits for another stream.
        own = {name: p.detach().requires_grad_() for name, p in learning.items()}
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
            outputs = list(functional_call(module, own, (self._x,)))
        self._outputs = [output.detach() for output in outputs]
        self._pending: weakref.ref[_Forward] | None = None
        self._number = 0
        if not own:
            return
        self._zero = [True] * len(outputs)
        self._of_outputs = [torch.zeros_like(output) for output in self._outputs]
        sizes = [p.numel() for p in self._parameters]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        # All in one tensor, so that one copy of it is what autograd may keep.
        self._gradients = torch.zeros(sum(sizes), device=x.device)
        with torch.cuda.graph(
            self._backward, pool=self._forward.pool(), capture_error_mode="thread_local"
        ):
            gradients = torch.autograd.grad(
                outputs,
                list(own.values()),
                self._of_outputs,
                retain_graph=True,
                allow_unused=True,
            )
            self._used = [gradient is not None for gradient in gradients]
            views = self._views(self._gradients)
            torch._foreach_copy_(
                [view for view in views if view is not None],
                [gradient for gradient in gradients if gradient is not None],
            )
        self._kept = outputs  # Autograd's graph holds what the recorded backward pass reads.

    @property
    def free(self) -> bool:
        """Whether no forward pass waits for its backward pass, whose tensors would be lost."""
        return self._pending is None or self._pending() is None

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return the outputs for a batch."""
        return list(_Replay.apply(self, x, *self._parameters))

    def _replay(self, x: Tensor) -> int:
        self._number += 1
        self._x.copy_(x)
        self._forward.replay()
        return self._number

    def _differentiate(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self._of_outputs[i].copy_(gradient)
            elif not self._zero[i]:
                self._of_outputs[i].zero_()
            self._zero[i] = gradient is None
        self._backward.replay()
        return self._views(self._gradients.clone())

    def _views(self, flat: Tensor) -> list[Tensor | None]:
        return [
            flat.as_strided(p.shape, p.stride(), offset) if used else None
            for p, offset, used in zip(self._parameters, self._offsets, self._used, strict=True)
        ]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphed: GraphedPass, x: Tensor, *parameters: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.graphed, ctx.number, ctx.alive = graphed, graphed._replay(x), _Forward()
        graphed._pending = weakref.ref(ctx.alive)
        first, *others = graphed._outputs
        return (first.clone(), *(output.detach() for output in others))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        graphed = ctx.graphed
        if ctx.number != graphed._number:
            raise RuntimeError(
                "cuda_graphs: expected the backward pass of the latest batch, got that of an "
                "earlier one; FastPath(cuda_graphs=False) keeps them all"
            )
        graphed._pending = None
        return (None, None, *graphed._differentiate(gradients))


class GraphedPasses:
    """Records a module's passes for batches that come again and again while it stays as it is.

    A batch of some shape is recorded the third time. The first two runs are usual ones, which warm
    up what a recording must not do for the first time. There is room for two shapes: the usual one,
    and that of an epoch's last batch.
    """

    def __init__(self) -> None:
        self._state: Hashable = None
        self._runs: Counter[torch.Size] = Counter()
        self._graphed: dict[torch.Size, GraphedPass] = {}
        self._failed = False

    def recorded(self, state: Hashable, module: nn.Module, x: Tensor) -> GraphedPass | None:
        """Return the passes recorded in a state; ``None`` where the module has to run itself."""
        if state != self._state:
            self._state = state
            self._runs.clear()
            self._graphed.clear()
        shape = x.shape
        self._runs[shape] += 1
        due = self._runs[shape] > 2 and len(self._graphed) < 2 and not self._failed
        if due and shape not in self._graphed:
            try:
                self._graphed[shape] = GraphedPass(module, x)
            except RuntimeError as error:
                log.warning("cuda_graphs: not recorded, the network runs as it is: %s", error)
                self._failed = True
        graphed = self._graphed.get(shape)
        return graphed if graphed is not None and graphed.free else None
