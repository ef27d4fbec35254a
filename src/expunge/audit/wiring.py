"""A decoder seen as a graph: embeddings, attention heads, feed-forward layers and the scores, all reading and writing one stream.

In a pre-norm transformer every part adds what it makes to the residual stream and reads the sum of what came before. So the
stream before a part is a sum over earlier parts, and an *edge* is the share of one part in what another reads. Heads are not
modules: what a head adds is its share of the input of attention's output matrix times its columns of that matrix, and what
reaches a head comes back through its rows of the query, key and value matrices alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from expunge.adapters import storage
from expunge.adapters.head import bare, base
from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.engine.feedforward import FeedForward

_OUTPUT = re.compile(r"(?:^|\.)\w*(?:attn|attention)\.(?:o_proj|out_proj|c_proj|dense|wo)$")
_APART = re.compile(r"(?:^|\.)(?:q_proj|k_proj|v_proj|query|key|value|wq|wk|wv)$")
_THIRDS = re.compile(r"(?:^|\.)c_attn$")
_WOVEN = re.compile(r"(?:^|\.)query_key_value$")
_GROUPS = "num_key_value_groups"  #: of attention whose heads share keys and values: how many share one


@dataclass(frozen=True)
class Graph:
    """The nodes and edges of a decoder.

    Sources are the embeddings, then of each layer its heads and its feed-forward layer; targets are the same without the
    embeddings, and the scores. An edge leads from each part to each later one: not between heads of a layer, and not from them to
    the feed-forward layer beside them, where a block runs both on the same input.

    Attributes:
        layers, heads: how many.
        parallel: of each layer, whether its feed-forward layer reads what its heads read.
    """

    layers: int
    heads: int
    parallel: tuple[bool, ...]

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names: ``embeddings``, ``0.h0``, ..., ``0.mlp``, ``1.h0``, ..."""
        return ("embeddings", *self._parts())

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Names: ``0.h0``, ..., ``0.mlp``, ..., ``scores``."""
        return (*self._parts(), "scores")

    def _parts(self) -> list[str]:
        return [f"{i}.{n}" for i in range(self.layers) for n in (*(f"h{h}" for h in range(self.heads)), "mlp")]

    @cached_property
    def edges(self) -> Tensor:
        """Whether there is an edge, bool ``[sources, targets]``."""
        stages = [2 * i + kind for i in range(self.layers) for kind in (*[0] * self.heads, 1)]
        reads = [2 * i if kind and self.parallel[i] else 2 * i + kind
                 for i in range(self.layers) for kind in (*[0] * self.heads, 1)]  # fmt: skip
        made = torch.tensor([-1, *stages])
        read = torch.tensor([*reads, 2 * self.layers])
        return made[:, None] < read[None, :]

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.edges.sum())

    @cached_property
    def depth(self) -> Tensor:
        """How deep each edge begins: the layer of its source, -1 for the embeddings; int64 ``[E]`` in the order of the edges."""
        layer = torch.tensor([-1, *(i for i in range(self.layers) for _ in range(self.heads + 1))])
        return layer[:, None].expand(len(self.sources), len(self.targets))[self.edges]


@dataclass(frozen=True)
class _Matrix:
    """A matrix through which heads read: its module, and which of its outputs belong to each head, int64 ``[H, f]``."""

    module: nn.Module
    rows: Tensor
    shared: bool  #: whether heads share outputs, which are then told apart before attention sees them


@dataclass(frozen=True)
class _Block:
    """Where a block's parts read and write."""

    reads: tuple[_Matrix, ...]
    writes: nn.Module
    attention: nn.Module
    feed: FeedForward
    heads_norm: nn.Module | None = None
    feed_norm: nn.Module | None = None


@dataclass
class Caught:
    """What one forward pass left at the parts of a model.

    Attributes:
        stream: the first block's input, ``[B, T, D]``.
        last: the last block's output, ``[B, T, D]``.
        read: of each layer what its query, key and value matrices made, and the inputs of its feed-forward matrices.
        mixed: of each layer the input of attention's output matrix, ``[B, T, H d]``.
        made: of each layer what the feed-forward layer adds, ``[B, T, D]``.
        norms: of each layer the inputs of the norms before attention and before the feed-forward layer, ``[B, T, D]``.
    """

    stream: Tensor = field(default_factory=lambda: torch.empty(0))
    last: Tensor = field(default_factory=lambda: torch.empty(0))
    read: list[tuple[list[Tensor], list[Tensor]]] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    norms: list[list[Tensor]] = field(default_factory=list)


class Wiring:
    """A decoder's parts, found by the names of its matrices and tried on a few tokens.

    Args:
        adapter: holds a decoder, not wrapped by an adapter of peft.

    Raises:
        InputError: its heads cannot be told apart, or what its parts add is not the residual stream.
    """

    def __init__(self, adapter: LanguageAdapter) -> None:
        self.model: Any = base(adapter.model)
        self._refuse(adapter)
        self.heads = int(getattr(storage.text_config(self.model), "num_attention_heads", 0) or 0)
        names = storage.block_names(self.model)
        modules = [self.model.get_submodule(n) for n in names]
        self.first, self.final = modules[0], modules[-1]
        self.blocks = [self._block(m, n) for m, n in zip(modules, names, strict=True)]
        self.graph = self._tried()

    # ---- what a model is made of

    def _refuse(self, adapter: LanguageAdapter) -> None:
        name = type(self.model).__name__
        if not isinstance(adapter, LanguageAdapter) or getattr(self.model.config, "is_encoder_decoder", False):
            raise InputError(f"{name} is an encoder-decoder, and circuits are looked for in decoders.", _REMEDY)
        if getattr(adapter.model, "kind", None) is not None:
            raise InputError(f"{name} is a target with something beside it, whose parts are no one graph.", _REMEDY)
        if hasattr(bare(adapter.model), "peft_config"):
            raise InputError(f"The {name} has an adapter of peft on it.", "Merge it into the weights first.")

    def _block(self, block: nn.Module, name: str) -> _Block:
        kind = type(self.model).__name__
        held = {n: m for n, m in block.named_modules() if _is_matrix(m)}
        outputs = [n for n in held if _OUTPUT.search(n)]
        if len(outputs) != 1 or not self.heads:
            raise InputError(
                f"The heads of {kind} cannot be told apart: its block {name!r} has {len(outputs)} modules that look like the "
                "output matrix of attention.", _REMEDY,
            )  # fmt: skip
        parent, writes = outputs[0].rpartition(".")[0], held[outputs[0]]
        attention = block.get_submodule(parent)
        beside = {n: m for n, m in held.items() if n.startswith(parent + ".") and n != outputs[0]}
        width = matrix_of(writes).shape[1]
        reads = [r for n, m in beside.items() if (r := self._reads(n, m, width)) is not None]
        if width % self.heads or not reads or len(reads) != len(beside):
            raise InputError(
                f"The heads of {kind} cannot be told apart: attention in its block {name!r} has the matrices "
                f"{', '.join(n.rpartition('.')[2] for n in beside) or 'none'}.", _REMEDY,
            )  # fmt: skip
        if any(r.shared for r in reads) and not hasattr(attention, _GROUPS):
            raise InputError(f"The heads of {kind} share keys and values in a way that is not known here.", _REMEDY)
        try:
            feed = FeedForward.of(block, name)
        except InputError as error:
            raise InputError(f"{kind} is no model of dense blocks: {error.message}", _REMEDY) from None
        return _Block(tuple(reads), writes, attention, feed)

    def _reads(self, name: str, module: nn.Module, width: int) -> _Matrix | None:
        """How the outputs of a matrix are dealt to the heads; none where that is not known."""
        size, each = matrix_of(module).shape[0], width // self.heads
        places = torch.arange(width).view(self.heads, each)
        if _APART.search(name) and size == width:
            return _Matrix(module, places, False)
        if _APART.search(name) and size % each == 0 and size < width and self.heads % (size // each) == 0:
            own = torch.arange(size).view(-1, each)
            return _Matrix(module, own.repeat_interleave(self.heads * each // size, 0), True)
        if _THIRDS.search(name) and size == 3 * width:
            return _Matrix(module, torch.cat([places, places + width, places + 2 * width], 1), False)
        if _WOVEN.search(name) and size == 3 * width:
            return _Matrix(module, torch.arange(size).view(self.heads, 3 * each), False)
        return None

    # ---- one forward pass

    @contextmanager
    def caught(self) -> Iterator[Caught]:
        """While open, a forward pass leaves what its parts read and write; heads that share keys get copies of their own."""
        found, none = Caught(), torch.empty(0)
        found.read = [([none] * len(b.reads), [none] * len(b.feed.inner)) for b in self.blocks]
        found.norms = [[none, none] for _ in self.blocks]
        found.mixed, found.made = [none] * len(self.blocks), [none] * len(self.blocks)
        with ExitStack() as stack:

            def on(module: nn.Module, hook: Any, *, before: bool = False) -> None:
                if before:
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                else:
                    stack.callback(module.register_forward_hook(hook).remove)

            on(self.first, lambda _m, args, kw: setattr(found, "stream", _given(args, kw)), before=True)
            on(self.final, lambda _m, _i, out: setattr(found, "last", _tensor(out)))
            for at, block in enumerate(self.blocks):
                self._hook(found, at, block, on, stack)
            yield found

    def _hook(self, found: Caught, at: int, block: _Block, on: Any, stack: ExitStack) -> None:
        heads, feed = found.read[at]

        def read(which: int, matrix: _Matrix) -> Any:
            def hook(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor | None:
                heads[which] = out.index_select(-1, matrix.rows.reshape(-1).to(out.device)) if matrix.shared else out
                return heads[which] if matrix.shared else None

            return hook

        def enter(which: int) -> Any:
            def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
                feed[which] = args[0].view_as(args[0])  # what reaches this matrix alone, whoever else reads the same tensor
                return (feed[which], *args[1:]), kwargs

            return hook

        def mixed(_module: nn.Module, args: Any, _kwargs: Any) -> None:
            found.mixed[at] = args[0]

        def made(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            found.made[at] = out

        def norm(which: int) -> Any:
            def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
                found.norms[at][which] = _given(args, kwargs)

            return hook

        for which, matrix in enumerate(block.reads):
            on(matrix.module, read(which, matrix))
        if any(m.shared for m in block.reads):
            own = getattr(block.attention, _GROUPS)
            setattr(block.attention, _GROUPS, 1)
            stack.callback(setattr, block.attention, _GROUPS, own)
        for which, module in enumerate(block.feed.inner):
            on(module, enter(which), before=True)
        on(block.writes, mixed, before=True)
        on(block.feed.output, made)
        for which, before in enumerate((block.heads_norm, block.feed_norm)):
            if before is not None:
                on(before, norm(which), before=True)

    # ---- what parts add, and what reaches them

    def added(self, found: Caught) -> Tensor:
        """What each source adds to the stream, without constant parts, ``[sources, B, T, D]``, without a graph."""
        out = [found.stream[None].detach()]
        for at, block in enumerate(self.blocks):
            mixed = found.mixed[at].detach()
            batch, length, width = mixed.shape
            columns = matrix_of(block.writes).view(-1, self.heads, width // self.heads)
            own = mixed.view(batch, length, self.heads, -1)
            out += [torch.einsum("bthd,ehd->hbte", own, columns), found.made[at].detach().view(1, batch, length, -1)]
        return torch.cat(out)

    def inputs(self, found: Caught) -> list[Tensor]:
        """The tensors of the graph by whose gradients :meth:`reached` knows what reaches each target."""
        return [t for heads, feed in found.read for t in (*heads, *feed)] + [found.last]

    def reached(self, found: Caught, gradients: list[Tensor]) -> Tensor:
        """Gradient with respect to what each target reads from the stream, ``[targets, B, T, D]``.

        Args:
            found: of the pass.
            gradients: with respect to :meth:`inputs`, in order.
        """
        held = iter(gradients)
        shape = found.stream.shape
        out = []
        for at, block in enumerate(self.blocks):
            by_head = sum(self._back(m, next(held)) for m in block.reads)
            assert isinstance(by_head, Tensor)
            out.append(_through(block.heads_norm, found.norms[at][0], by_head, shape))
            into = sum(next(held).reshape(shape) for _ in block.feed.inner)
            assert isinstance(into, Tensor)
            out.append(_through(block.feed_norm, found.norms[at][1], into[None], shape))
        return torch.cat([*out, next(held).reshape(shape)[None]])

    def _back(self, matrix: _Matrix, gradient: Tensor) -> Tensor:
        """What comes back through a matrix for each head, ``[H, B, T, D]``."""
        rows = matrix.rows.to(gradient.device)
        own = gradient if matrix.shared else gradient.index_select(-1, rows.reshape(-1))
        parts = own.view(*own.shape[:2], *rows.shape)
        return torch.einsum("bthf,hfd->hbtd", parts, matrix_of(matrix.module)[rows])

    # ---- the trial

    def _tried(self) -> Graph:
        """Find the norms, and check on a few tokens that parts add up to the stream and gradients to its gradient.

        Raises:
            InputError: they do not.
        """
        kind, rows = type(self.model).__name__, self.model.get_input_embeddings().weight
        ids = (torch.arange(8).view(2, 4) * 7 + 3).remainder(rows.shape[0]).to(rows.device)
        exact = rows.dtype in (torch.float32, torch.float64)
        tolerance = 1e-3 if exact else 5e-2
        with torch.no_grad():
            plain = self.model(input_ids=ids, use_cache=False)["logits"]
        self.blocks = self._norms(ids)
        start = self.model.get_input_embeddings()(ids).detach().requires_grad_()
        try:
            with torch.enable_grad(), self.caught() as found:
                logits = self.model(inputs_embeds=start, attention_mask=torch.ones_like(ids), use_cache=False)["logits"]
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{kind} does not run with its heads apart: {str(error).splitlines()[0]}.", _REMEDY) from None
        added, last = self.added(found), found.last.detach()
        sums = [added.sum(0)[0] - added.sum(0)[1], last[0] - last[1]]  # of two inputs: biases of outputs fall out
        made = logits.float().log_softmax(-1)[..., 0].sum()
        gradients = torch.autograd.grad(made, [*self.inputs(found), found.stream], retain_graph=True)
        reached = self.reached(found, list(gradients[:-1]))
        for what, one, other in (
            ("change what it says", logits.float(), plain.float()),
            ("do not add up to its states", sums[0], sums[1]),
            ("do not add up to its gradient", reached.sum(0), gradients[-1]),
        ):
            if (one - other).abs().max() > tolerance * other.abs().max():
                raise InputError(f"The parts of {kind} {what}: it is no plain pre-norm decoder.", _REMEDY)
        self._check_heads(found, kind)
        parallel = tuple(torch.equal(a.reshape(-1), b.reshape(-1)) for a, b in found.norms)
        return Graph(len(self.blocks), self.heads, parallel)

    def _norms(self, ids: Tensor) -> list[_Block]:
        """The blocks with the norms whose outputs their matrices read."""
        seen: dict[int, nn.Module] = {}
        kept: list[Tensor] = []  # so that no address is given twice
        inside = {m for name in storage.block_names(self.model) for m in self.model.get_submodule(name).modules()}
        matrices = {m for b in self.blocks for m in (*(r.module for r in b.reads), *b.feed.inner)}
        read: dict[nn.Module, int] = {}

        def after(module: nn.Module, _inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                kept.append(out)
                seen[out.data_ptr()] = module

        def before(module: nn.Module, args: Any, _kwargs: Any) -> None:
            read[module] = args[0].data_ptr()

        with ExitStack() as stack, torch.no_grad():
            for module in inside:
                if "norm" in type(module).__name__.lower():
                    stack.callback(module.register_forward_hook(after).remove)
                if module in matrices:
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            self.model(input_ids=ids, use_cache=False)
        out = []
        for block in self.blocks:
            heads, feed = (seen.get(read[m]) for m in (block.reads[0].module, block.feed.inner[0]))
            if heads is None or feed is None:
                raise InputError(
                    f"{type(self.model).__name__} has no norm before attention or before its feed-forward layer.", _REMEDY
                )
            out.append(_Block(block.reads, block.writes, block.attention, block.feed, heads, feed))
        return out

    def _check_heads(self, found: Caught, kind: str) -> None:
        """Check in the first block that what a head mixes comes from its own rows of the matrices alone."""
        made = found.read[0][0]
        parts = found.mixed[0].view(*found.mixed[0].shape[:2], self.heads, -1)
        for head in range(self.heads):
            gradients = torch.autograd.grad(parts[:, :, head].square().sum(), made, retain_graph=True)
            for matrix, gradient in zip(self.blocks[0].reads, gradients, strict=True):
                rows = matrix.rows.to(gradient.device)
                own = gradient if matrix.shared else gradient.index_select(-1, rows.reshape(-1))
                others = own.view(*own.shape[:2], *rows.shape).clone()
                others[:, :, head] = 0
                if others.abs().max() > 0:
                    raise InputError(f"The heads of {kind} cannot be told apart: they read one another's rows.", _REMEDY)


_REMEDY = "Use a dense decoder such as Llama, Qwen, GPT-2, GPT-NeoX or OPT."


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a matrix as ``[outputs, inputs]``, without gradient (GPT-2's modules hold it the other way round)."""
    weight: Any = module.weight
    matrix: Tensor = weight.detach() if isinstance(module, nn.Linear) else weight.detach().T
    return matrix


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.device.type != "meta"
    return plain and (type(module) is nn.Linear or type(module).__name__ == "Conv1D")


def _given(args: Any, kwargs: Any) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _tensor(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


def _through(norm: nn.Module | None, stream: Tensor, gradients: Tensor, shape: torch.Size) -> Tensor:
    """Gradients ``[K, B, T, D]`` at a norm's output as they are at its input."""
    assert norm is not None  # every block has them once it was tried
    with torch.enable_grad():
        start = stream.detach().reshape(shape).expand(gradients.shape).clone().requires_grad_()
        return torch.autograd.grad(norm(start), start, gradients)[0]
