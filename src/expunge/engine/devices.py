"""Processes, devices and precision, by Hugging Face accelerate; nothing of the distribution is our own."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from expunge.engine.options import Engine


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process: the accelerator's if that is the device, else resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Devices:
    """A thin hold on an ``Accelerator``: one process by default, DDP or FSDP2 under ``accelerate launch``."""

    def __init__(self, engine: Engine) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        # RMU-like losses read an inner layer: later parameters then get no gradient, which DDP must be told to expect.
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        log_with = list(engine.trackers) or None
        self.accelerator = Accelerator(cpu=engine.device == "cpu", kwargs_handlers=handlers, log_with=log_with)
        self.engine = engine
        self.device: torch.device = self.accelerator.device
        self.world: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.main: bool = self.accelerator.is_main_process
        # accelerate shards models on accelerators only. On CPU we call what it calls, torch's fully_shard, so that the sharded
        # path is the same code wherever it runs, and can be tested without an accelerator.
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self._shards_here = asked and self.world > 1 and self.device.type == "cpu"
        self.sharded: bool = self._shards_here or self.accelerator.distributed_type.value == "FSDP"
        if log_with:
            self.accelerator.init_trackers("expunge", config={"seed": engine.seed})

    def prepare(
        self, model: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer], layers: Sequence[str]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Place the model and, with several processes, wrap or shard it; ``optimizer`` makes one, ``layers`` are its blocks."""
        if self._shards_here:
            from torch.distributed.fsdp import fully_shard

            for name, module in model.named_modules():
                if any(name == layer or name.endswith("." + layer) for layer in layers):
                    fully_shard(module)
            fully_shard(model)
            return model, optimizer(model)
        if self.world == 1 and not self.sharded:
            return model.to(self.device), optimizer(model)
        prepared: tuple[nn.Module, Any] = self.accelerator.prepare(model, optimizer(model))
        return prepared

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The user's module inside the wrapping."""
        if self.world == 1 or self._shards_here:
            return model
        inner: nn.Module = self.accelerator.unwrap_model(model)
        return inner

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module, last: bool, manual: bool) -> Iterator[None]:
        """Hold back the exchange of gradients until the last forward pass of a step (altogether, if done by hand)."""
        if self._shards_here:
            cast(Any, model).set_requires_gradient_sync(last)
            yield
        elif self.world == 1 or (last and not manual):
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 matrix products where asked for."""
        if self.engine.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward; DDP and FSDP average over processes, while our losses are shares of one sum: hence the factor."""
        torch.autograd.backward(loss * self.world if self.world > 1 else loss)

    def reduce_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum each tensor over processes."""
        if self.world == 1:
            return list(tensors)
        return [self.accelerator.reduce(t, reduction="sum") for t in tensors]

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over processes, in float64."""
        if self.world == 1:
            return list(values)
        total = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), reduction="sum")
        return [float(v) for v in total.tolist()]

    def clip(self, parameters: Sequence[nn.Parameter], limit: float | None) -> float:
        """Scale the gradient down to ``limit``; returns its norm before."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        size = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if limit is not None and size > limit:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return size

    def gather(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The whole state of a sharded model in main memory (empty on all processes but the first), None if it is not sharded."""
        if not self.sharded:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        held = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return cast(dict[str, Tensor], held)

    def peak_bytes(self) -> int:
        """Peak memory of this process: the accelerator's if there is one, else resident memory."""
        return peak_bytes(self.device)

    def track(self, row: dict[str, float], step: int) -> None:
        """Hand a row of the log to the optional trackers."""
        if self.engine.trackers:
            self.accelerator.log(row, step=step)

    def end(self) -> None:
        """Close the trackers."""
        if self.engine.trackers:
            self.accelerator.end_training()
