"""What ran forward: for every autograd node the operation, the module and the source line that made it.

A `Trace` is a `TorchFunctionMode`, so it sees every torch call of any Python code, functional or in a
module, and needs neither module hooks that break graphs nor the names of an architecture. After each
call it walks from the result's `grad_fn` to the nodes it already knows: what lies between was made by
this call. All statistics stay on the device until `Readings` reads them back in one copy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from isograd.graph import signal
from isograd.graph.call import (
    ActivationStatistics,
    AttentionStatistics,
    Call,
    LossCall,
    Made,
    NormalisationStatistics,
)
from isograd.graph.cuts import Cuts
from isograd.graph.norm import norm
from isograd.graph.operations import (
    ACTIVATIONS,
    LOSSES,
    clips,
    kind_of_call,
    operation_of,
    parameter_of,
)
from isograd.graph.source import shown, source
from isograd.graph.weights import Weights

_GET_DATA = vars(torch._C.TensorBase)["data"].__get__
_SET_REQUIRES_GRAD = vars(torch._C.TensorBase)["requires_grad"].__set__


@dataclass
class Trace(TorchFunctionMode):
    """Records a forward pass. Use `with trace.recording(): loss = closure(model)`."""

    model: nn.Module
    made: dict[Node, Made] = field(default_factory=dict[Node, Made])
    activations: list[ActivationStatistics] = field(default_factory=list[ActivationStatistics])
    losses: list[LossCall] = field(default_factory=list[LossCall])
    norms: list[NormalisationStatistics] = field(default_factory=list[NormalisationStatistics])
    attentions: list[AttentionStatistics] = field(default_factory=list[AttentionStatistics])
    outputs: dict[str, Node] = field(default_factory=dict[str, Node])
    """Node of each module's (last) output, by module path."""
    inputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Statistics of the model's float inputs, by name: see `flow.InputStatistics`."""
    opened: list[Tensor] = field(default_factory=list[Tensor])
    """Leaves put in front of the model's float inputs."""
    results: list[Node] = field(default_factory=list[Node])
    """Nodes of the tensors the model itself returned."""
    given: set[int] = field(default_factory=set[int])
    """Addresses of the tensors that the model was given."""
    ran: set[str] = field(default_factory=set[str])
    """Paths of the modules that were called with gradients enabled."""
    closed: set[str] = field(default_factory=set[str])
    """Paths of the modules that were called without."""
    cuts: Cuts = field(init=False)
    weights: Weights = field(init=False)
    entered: int = 0
    calls: int = 0
    """Of the model as a whole."""

    def __post_init__(self) -> None:
        super().__init__()
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._stack: list[tuple[str, int, str]] = []
        self._order = 0
        self.mixing: set[Node] = set()  # softmaxes that multiply other activations: attention written out
        self._parameters = {id(p): name for name, p in self.model.named_parameters()}
        self.cuts = Cuts(self._parameters)
        self.weights = Weights(self.model)

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """Watch every torch call and every module call until the block ends."""
        with ExitStack() as stack:
            before = nn.modules.module.register_module_forward_pre_hook(self._enter)
            stack.callback(before.remove)
            after = nn.modules.module.register_module_forward_hook(self._leave, always_call=True)
            stack.callback(after.remove)
            root = self.model.register_forward_pre_hook(self._receive, with_kwargs=True)
            stack.callback(root.remove)
            stack.enter_context(self)
            yield self

    def keep(self, nodes: Collection[Node]) -> None:
        """Forget what the loss does not depend on, so that nothing of it is kept alive."""
        self.made = {node: made for node, made in self.made.items() if node in nodes}
        self.outputs = {path: node for path, node in self.outputs.items() if node in nodes}
        self.results = [node for node in self.results if node in nodes]
        self.activations = [seen for seen in self.activations if seen.node in nodes]
        self.losses = [call for call in self.losses if call.node in nodes]
        self.norms = [seen for seen in self.norms if seen.node in nodes]
        self.attentions = [seen for seen in self.attentions if seen.node in nodes]

    # -- modules -----------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.attribute_custom(args)
        self.entered += 1
        name = self._names.get(id(module), self._stack[-1][0] if self._stack else "")
        (self.ran if torch.is_grad_enabled() else self.closed).add(name)
        leaf = type(module).__name__ if next(module.children(), None) is None else ""
        self._stack.append((name, self.entered, leaf))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._stack:
            return
        name = self._stack[-1][0]
        for tensor in pytree.tree_leaves(output) if output is not None else ():
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                if tensor.grad_fn not in self.made:  # made outside of any torch function
                    self._attribute(tensor, self._call("custom", "custom"))
                self.outputs[name] = tensor.grad_fn
                if module is self.model:
                    self.results.append(tensor.grad_fn)
        self._stack.pop()

    def _receive(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the gradient reach the model's float inputs, and remember what data it was given."""
        self.calls += 1
        named = argument_names(module, args)

        def open_input(path: Any, value: Any) -> Any:
            if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
                return value
            if torch.is_inference_mode_enabled():  # no gradient comes back, and the loss is told so
                return value
            self.given.add(value.data_ptr())
            if value.numel() < 2:  # a temperature, a time
                return value
            head = pytree.keystr(path[:2])
            name = named.get(head, head.removeprefix("[1]").strip("[]'")) + pytree.keystr(path[2:])
            if not value.is_floating_point() or value.grad_fn is not None or "mask" in name:
                return value
            seen = value.detach().double() if value.numel() < 1_000_000 else value.detach().float()
            varying = seen.var(0, correction=0).mean().sqrt() if len(seen) > 1 else seen.std()
            statistics = [seen.mean(), seen.square().mean().sqrt(), seen.std(), seen.abs().amax(), varying]
            self.inputs[name] = torch.stack(statistics).double()
            # Its values are the user's, bit by bit; a clone, so that in-place operations stay allowed.
            leaf = value if value.requires_grad else value.detach().requires_grad_()
            opened = leaf.clone()
            made = Made(self._call("input", "input"), tuple(value.shape), _name(value.dtype))
            made.rms = norm([value]) / value.numel() ** 0.5
            made.distinct, made.varying = signal.distinct(value), signal.varying(value)
            made.call.user_input = True
            made.call.settings = (("name", name),)
            assert opened.grad_fn is not None
            self.made[opened.grad_fn] = made
            self.opened.append(leaf)
            return opened

        with torch._C.DisableTorchFunction(), torch.enable_grad():
            args, kwargs = pytree.tree_map_with_path(open_input, (args, kwargs))
        return args, kwargs

    # -- calls -------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _inside_transform():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__set__" and func == _SET_REQUIRES_GRAD and args[1] and not args[0].is_leaf:
            return None  # some models switch their input's gradient on; it is on already
        if name in ("detach", "detach_", "numpy") or func == _GET_DATA:
            self.cuts.add("data" if func == _GET_DATA else name.rstrip("_"), args[:1])
        if name in ("__get__", "__set__", "size", "dim", "numel", "__len__", "is_floating_point"):
            return func(*args, **kwargs)
        if name == "hardtanh" and (kwargs.get("min_val", args[1] if len(args) > 1 else -1.0)) == 0:
            name = "relu6"  # which calls it, and is flat below zero by design
        function = "hardtanh" if clips(name, args, kwargs) else name.rstrip("_")
        activation = ACTIVATIONS.get(function) if args and isinstance(args[0], Tensor) else None
        derivative = None
        if activation and args[0].requires_grad and args[0].is_floating_point():
            derivative = signal.derivative(func, args, kwargs)
        if torch.is_grad_enabled():
            self.attribute_custom(args)
        out = func(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.cuts.add("no_grad", (*args, *kwargs.values()))
            return out
        tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.grad_fn is not None]
        if not tensors:
            return out
        with torch._C.DisableTorchFunction(), torch.no_grad():
            call = self._call(name, kind_of_call(name, args, kwargs))
            self._describe(call, args, kwargs)
            if name == "multi_head_attention_forward":
                self.weights.project(signal.bound(func, args, kwargs))
            for tensor in tensors:
                self._attribute(tensor, call)
            if derivative is not None and activation is not None:
                self._activation(tensors[0], function, derivative, activation.largest_slope)
            self._normalisation(func, args, kwargs, tensors[0])
            if (spread := signal.spread(func, args, kwargs)) is not None:
                self.attentions.append(AttentionStatistics(cast(Node, tensors[0].grad_fn), spread))
            if name in LOSSES:
                self._loss(name, args, kwargs, tensors[0])
            elif not self._stack and name.strip("_") in ("sub", "rsub") and len(args) == 2:
                self._difference(args, tensors[0])
        return out

    def _call(self, name: str, kind: str) -> Call:
        module, invocation, leaf = self._stack[-1] if self._stack else ("", 0, "")
        self._order += 1
        return Call(name.strip("_"), kind, module, invocation, source(), self._order, leaf)

    def _describe(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where the units lie in the output, and whether the model's data comes in here."""
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        data = [t for t in tensors if not t.requires_grad and id(t) not in self._parameters and t.ndim > 0]
        call.data = bool(data)
        call.user_input = any(t.layout == torch.strided and t.data_ptr() in self.given for t in data)
        call.parameters = tuple(self._parameters[id(t)] for t in tensors if id(t) in self._parameters)
        given = (*enumerate(args), *kwargs.items())
        call.settings = tuple(
            (key, _plain(a)) for key, a in given if a is not None and not isinstance(a, Tensor)
        )
        call.given = tuple(
            (f"argument {key + 1 if isinstance(key, int) else key}", a)
            for key, a in given
            if isinstance(a, Tensor)
            and a.is_floating_point()
            and not a.requires_grad
            and id(a) not in self._parameters
        )
        if call.kind == "linear" and self._averages_data(tensors):
            call.kind = "product"
        if call.kind in ("linear", "convolution"):
            equation = args[0] if call.operation == "einsum" else None
            self.weights.weigh(call, tensors, equation, self._maker)
        elif call.kind in ("attention", "product") and not call.parameters:
            call.parameters = self._made_values(call, tensors)
        if call.kind == "convolution":
            call.unit_dim = 1
        elif call.kind not in ("linear", "attention", "embedding", "recurrent"):
            above = next((self.made[t.grad_fn] for t in tensors if t.grad_fn in self.made), None)
            if above is not None:
                call.unit_dim = above.call.unit_dim
        if call.operation in ("batch_norm", "group_norm", "instance_norm"):
            call.unit_dim = 1

    def _maker(self, tensor: Tensor) -> Call | None:
        node = self._origin(tensor, {"reshape"})
        return None if node is None else self.made[node].call

    def _averages_data(self, tensors: list[Tensor]) -> bool:
        """A softmax times the model's own input, which is a leaf as weights are: attention whose values no layer made."""
        if any(id(parameter_of(t)) in self._parameters for t in tensors):
            return False
        return any(n is not None and self.made[n].call.kind == "softmax" for n in self._origins(tensors))

    def _origins(self, tensors: list[Tensor]) -> list[Node | None]:
        return [self._origin(t, {"reshape", "dropout"}) for t in tensors]

    def _made_values(self, call: Call, tensors: list[Tensor]) -> tuple[str, ...]:
        """The parameters of the layer that made what an attention averages."""
        if call.kind == "attention":
            values = tensors[2:3]
        else:  # written out: the operand that is not the softmax
            nodes = self._origins(tensors)
            mixing = {n for n in nodes if n is not None and self.made[n].call.kind == "softmax"}
            self.mixing |= mixing
            weighted = [n is not None and self.made[n].call.weighted for n in nodes]
            values = [t for t, flag in zip(tensors, weighted, strict=True) if flag and mixing]
        maker = self._maker(values[0]) if len(values) == 1 else None
        return maker.parameters if maker is not None and maker.weighted else ()

    def _origin(self, tensor: Tensor, passing: Collection[str]) -> Node | None:
        """The node that made a tensor, behind calls of the kinds that only pass it on."""
        node = tensor.grad_fn
        while node is not None and (node not in self.made or self.made[node].call.kind in passing):
            node = next((below for below, _ in node.next_functions if below is not None), None)
        return node

    def attribute_custom(self, operands: Iterable[object]) -> None:
        """Custom Functions are no torch calls: their results are first seen where something takes them in."""
        flat = (one for a in operands for one in (a if isinstance(a, list | tuple) else (a,)))
        for tensor in flat:
            if not isinstance(tensor, Tensor) or not hasattr(tensor.grad_fn, "_forward_cls"):
                continue
            if tensor.grad_fn not in self.made:
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    self._attribute(tensor, self._call("custom", "custom"))

    def _attribute(self, tensor: Tensor, call: Call) -> None:
        """All nodes between this result and those already known were made by this call."""
        top = tensor.grad_fn
        assert top is not None
        stack = [top] if top not in self.made else []
        while stack:
            node = stack.pop()
            if node in self.made:
                continue
            self.made[node] = Made(_custom(call, node) if hasattr(node, "_forward_cls") else call)
            stack.extend(n for n, _ in node.next_functions if n is not None and not hasattr(n, "variable"))
        made = self.made[top]
        if made.shape is not None:  # a later output of the same node, or a result passed on unchanged
            return
        made.shape, made.dtype = tuple(tensor.shape), _name(tensor.dtype)
        if tensor.numel() and tensor.is_floating_point() and call.kind != "reshape":
            made.rms, made.varying = norm([tensor]) / tensor.numel() ** 0.5, signal.varying(tensor)
            if made.call.unit_dim in (-1, tensor.ndim - 1):
                made.distinct = signal.distinct(tensor)

    def _normalisation(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Tensor) -> None:
        """Torch's own, or a root of a sum with a number in a module that is called one."""
        found = signal.denominator(func, args, kwargs)
        if found is None and func.__name__ in signal.ROOTS and "norm" in self._leaf().lower():
            made = self.made.get(args[0].grad_fn)
            added = [v for _, v in made.call.settings if isinstance(v, float)] if made else []
            if made is not None and made.call.kind == "addition" and len(added) == 1:
                found = added[0], args[0].detach().double().mean() - added[0], None
        if found is not None:
            assert out.grad_fn is not None
            maker = self._maker(kwargs.get("input", args[0] if args else out))
            layer = maker.parameters if maker is not None and maker.kind in ("linear", "convolution") else ()
            self.norms.append(NormalisationStatistics(out.grad_fn, *found, layer))

    def _leaf(self) -> str:
        return self._stack[-1][2] if self._stack else ""

    def _activation(self, out: Tensor, name: str, derivative: Tensor, largest: float) -> None:
        node = out.grad_fn
        assert node is not None
        values, units = signal.slopes(derivative, self.made[node].call.unit_dim, largest)
        samples = derivative.numel() // max(units, 1)
        self.activations.append(ActivationStatistics(node, name.strip("_"), values, units, samples))

    def _difference(self, args: tuple[Any, ...], out: Tensor) -> None:
        """Output minus target outside of the model: the loss of a regression, written by hand."""
        given = next((a for a in args if isinstance(a, Tensor) and a.grad_fn is not None), None)
        target = next((a for a in args if isinstance(a, Tensor) and not a.requires_grad), None)
        if given is not None and target is not None and given.numel() == target.numel() and given.ndim:
            self._loss("subtraction", (given, target), {}, out)

    def _loss(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        given = kwargs.get("input", args[0] if args else None)
        target = kwargs.get("target", args[1] if len(args) > 1 else None)
        if isinstance(given, Tensor) and isinstance(target, Tensor) and given.numel():
            values, shape = signal.asked(name, given.detach(), target.detach())
            kind = "values" if target.is_floating_point() else "classes"
            pairs = signal.pairs(name, given, target)
            self.losses.append(LossCall(name, out.grad_fn, given.grad_fn, shape, values, kind, pairs))


def _custom(call: Call, node: Any) -> Call:
    """The call of a custom Function; nobody saw the line that applied it, but its own forward stands in a file."""
    code = getattr(inspect.unwrap(node._forward_cls.forward), "__code__", None)
    file = shown(code.co_filename) if code is not None else ""
    where = f"{file}:{code.co_firstlineno}" if code is not None and file else ""
    return replace(call, operation=operation_of(node), kind="custom", source=where, given=())


def _plain(value: object) -> object:
    """Numbers, words and tuples of them: what may be kept of a call when its tensors are gone."""
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value if isinstance(value, bool | int | float | str) else None


def argument_names(module: nn.Module, args: tuple[Any, ...]) -> dict[str, str]:
    """`[0][1]` -> the name of the second positional argument of the module's forward."""
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in (0, 1)]
    return {f"[0][{i}]": names[i] if i < len(names) else f"input {i}" for i in range(len(args))}


def _inside_transform() -> bool:
    """Inside vmap or torch.func, whose wrapped tensors have nodes of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
