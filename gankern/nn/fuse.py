"""fuse: somebody's network, its layers and activations run as one op each; unfuse, and a report of what was fused and why not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from gankern import checks
from gankern.nn import _calls, _chain, _rewrite

Module = TypeVar("Module", bound=nn.Module)
DECIDED = "decided at each call"


def fuse(model: Module, *, inplace: bool = False) -> Module:
    """The same network, in which a layer, the activation after it and the dropout after that run as one op.

        critic = gankern.fuse(critic)

    | calls that follow each other | run as |
    |---|---|
    | nn.Linear, LeakyReLU or ReLU, and Dropout if there is one | `gankern.linear_lrelu` |
    | nn.Conv1d ... nn.ConvTranspose3d, LeakyReLU or ReLU | the library's convolution and `gankern.bias_lrelu` |
    | nn.BatchNorm1d, 2d, 3d, LeakyReLU or ReLU | `gankern.bn_lrelu`, the layer before it by itself |

    LeakyReLU is nn.LeakyReLU, F.leaky_relu or one of their in-place forms with a slope >= 0; ReLU is nn.ReLU, F.relu, torch.relu or
    x.relu(); Dropout is nn.Dropout or F.dropout. They are found in each nn.Sequential, and in any forward written in Python: in
    F.leaky_relu(self.fc(x), 0.2) as in statements x = self.fc(x), x = self.act(x) that follow each other, in loops over layers, in
    methods that forward calls.

    The layers stay what they are. Only the modules whose forward calls them get a subclass of their class, whose forward decides
    at each call what can run as one op, by the objects it finds there. So every parameter, buffer, state_dict key, hook, submodule,
    train and eval mode, copy, pickle and torch.save is as before; `isinstance` too. What is changed later counts at the next call:
    a slope, a dropout probability, a layer replaced, a hook or a parametrization added. Layers under spectral or weight norm
    (`torch.nn.utils.parametrizations`, gankern.nn.spectral_norm) are fused like others; a layer or activation with hooks is
    called as it stands, and so are subclasses with a forward of their own. Numbers are those of the unfused network up to rounding,
    except that dropout may draw another mask from the same generator.

    - ReLU after a linear layer or convolution in float16 is left to PyTorch: the sums overflow there, and of -inf the ops make NaN
      where ReLU makes 0 (in the other dtypes too, should a sum ever be -inf).
    - A variable that a forward changes in place (x += y, as in torchvision's ResNet) is not fused into; where x = x + y is written,
      it is. Elsewhere (y = block(x); y += z) autograd may raise in the backward pass, because it has kept y, as it does after
      nn.ReLU.
    - Forwards are read from their source. One that cannot be read, or whose source is not what runs, is left; the report says so.
    - `unfuse` before torch.jit.script. A class made by fuse is pickled as the user's, and needs gankern to be loaded.

    Args:
        model: any module; wrap it (DistributedDataParallel, torch.compile) after fusing.
        inplace: False leaves `model` as it is and returns a copy, with the very same Parameters and buffers: optimisers made before
            train both. True changes `model`.

    Returns:
        The fused network; `gankern.fusion_report` says what was fused and what was not, and why.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        checks.fail(TypeError, "fuse", "model", "be a torch.nn.Module", type(model).__name__)
    if not inplace:
        model = _share(model)
    for module in list(model.modules()):
        if isinstance(module, Fused) or "forward" in module.__dict__ or parametrize.is_parametrized(module):
            continue
        cls = fused_class(type(module))
        if cls is not None and any(run.into for run in _runs(module, cls)):
            object.__setattr__(module, "__class__", cls)
    return model


def unfuse(model: Module) -> Module:
    """Undo `fuse`, in place: every module gets its own class back. Returns model.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        checks.fail(TypeError, "unfuse", "model", "be a torch.nn.Module", type(model).__name__)
    for module in model.modules():
        cls: Any = type(module)
        if isinstance(module, Fused) and "unfused" in cls.__dict__:
            object.__setattr__(module, "__class__", cls.unfused)
    return model


def _share(model: Module) -> Module:
    """A copy of the modules, with the same tensors."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for values in (module._parameters, module._buffers, module.__dict__):
            memo |= {id(t): t for t in values.values() if isinstance(t, Tensor)}
    return copy.deepcopy(model, memo)


# --- the class of a fused module ------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Base of the classes that `fuse` gives to modules; `unfused` is what the module was."""

    unfused: ClassVar[type[nn.Module]]
    sites: ClassVar[list[_rewrite.Site]]

    def __init_subclass__(cls) -> None:
        """The user's class hears nothing of its subclass."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the user's class reduces itself, then fused again: the class made here has no name to be pickled by."""
        cls: Any = type(self)
        if "unfused" not in cls.__dict__:
            return super().__reduce_ex__(protocol)
        object.__setattr__(self, "__class__", cls.unfused)
        try:
            made, args, *rest = self.__reduce_ex__(protocol)
        finally:
            object.__setattr__(self, "__class__", cls)
        return _fused_again, (made, args), *rest


def _fused_again(made: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = made(*args)
    cls = fused_class(type(module))
    if cls is not None:
        object.__setattr__(module, "__class__", cls)
    return module


def fused_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass that runs cls's calls by `step`, or None where there is nothing to change; the same one for the same class."""
    for made in [*cls.__subclasses__(), *(_chain.FusedSequential.__subclasses__() if cls is nn.Sequential else [])]:
        if made.__dict__.get("unfused") is cls:
            return made
    sequential = cls is nn.Sequential or (issubclass(cls, nn.Sequential) and not _is_torchs(cls))
    methods: dict[str, Any] = {}
    sites: list[_rewrite.Site] = []
    for name, function in _methods(cls):
        try:
            new, found = _rewrite.rewrite(function)
        except _rewrite.Refused:
            continue
        if found:
            methods[name] = _unless_replaced(cls, name, function, new)
            sites += found
    if not sequential and not methods:
        return None
    bases = (cls,) if not sequential else (_chain.FusedSequential,) if cls is nn.Sequential else (cls, _chain.FusedSequential)
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, (Fused, *bases), {**namespace, **methods, "unfused": cls, "sites": sites})


def _methods(cls: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """forward, and the methods that it calls, however deep, as far as they are the user's."""
    todo, done = ["forward"], set()
    while todo:
        name = todo.pop()
        home = next((c for c in cls.__mro__ if name in c.__dict__), None)
        if name in done or home is None or _is_torchs(home):
            continue
        done.add(name)
        function = home.__dict__[name]
        if isinstance(function, FunctionType):
            yield name, function
            todo += function.__code__.co_names
        elif name == "forward":
            yield name, function


def _is_torchs(cls: type) -> bool:
    """Whether its methods are PyTorch's: they are left alone."""
    return cls is object or cls.__module__.split(".")[0] == "torch"


def _unless_replaced(cls: type, name: str, old: FunctionType, new: FunctionType) -> Any:
    """The rewritten method; where somebody has replaced the original since, what stands in its place."""

    @functools.wraps(old)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = getattr(cls, name)
        return (new if now is old else now)(self, *args, **kwargs)

    return method


# --- the report -----------------------------------------------------------------------------------------------------------------


class FusionRow(NamedTuple):
    """One layer: path of its module, the calls that run together, the op that runs them, or "" and why it was left."""

    path: str
    calls: str
    into: str
    why: str = ""


class FusionReport(NamedTuple):
    """What `fusion_report` returns; prints as a table."""

    rows: list[FusionRow]

    @property
    def fused(self) -> list[FusionRow]:
        return [row for row in self.rows if row.into]

    @property
    def left(self) -> list[FusionRow]:
        return [row for row in self.rows if not row.into]

    def __str__(self) -> str:
        table = [("layer", "calls", "runs as"), *((r.path or "(model)", r.calls, r.into or f"left: {r.why}") for r in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in (0, 1)]
        lines = [f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in table]
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.left)} left"])


def fusion_report(model: nn.Module) -> FusionReport:
    """What runs as one op in a model that `fuse` returned, and what was left, with the reason; as the modules are now.

    A row is a layer: linear, convolution or BatchNorm. One that a forward calls twice has two rows. Where only the call decides
    (a layer that a loop gets from elsewhere), the row has the source in place of the path.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        checks.fail(TypeError, "fusion_report", "model", "be a torch.nn.Module", type(model).__name__)
    paths: dict[Any, str] = {module: path for path, module in model.named_modules()}
    order: dict[Any, int] = {module: i for i, module in enumerate(paths)}
    rows: list[tuple[int, FusionRow]] = []
    seen: set[Any] = set()
    for module in paths:
        fused = isinstance(module, Fused)
        for found in _runs(module, type(module) if fused else fused_class(type(module))):
            why = found.why or ("" if fused else _why_not_fused(module))
            path = paths.get(found.layer, found.calls)
            seen.add(found.layer)
            rows.append((order.get(found.layer, order[module]), FusionRow(path, found.calls, "" if why else found.into, why)))
    layers: Any = tuple(_chain.LAYERS)
    for module, path in paths.items():
        if module not in seen and isinstance(module, layers):
            why = _why_alone(module, path, model)
            rows.append((order[module], FusionRow(path, type(module).__name__, "", why)))
    return FusionReport([row for _, row in sorted(rows, key=lambda pair: pair[0])])


class _Run(NamedTuple):
    """Calls that run as one op, or why the layer runs alone; layer: the module, or None where only the call shows it."""

    layer: Any
    calls: str
    into: str
    why: str


def _runs(module: nn.Module, cls: type[nn.Module] | None) -> Iterator[_Run]:
    """What the forward of a fused module runs as one op, and which layers alone, as its submodules are now."""
    if cls is None:
        return
    forward = cls.unfused.forward  # type: ignore[attr-defined]
    if issubclass(cls, _chain.FusedSequential) and (
        forward is nn.Sequential.forward or "super" in getattr(forward, "__code__", _NO_CODE).co_names
    ):
        modules = list(module) if isinstance(module, nn.Sequential) else []
        yield from _runs_of([_calls.Called(m, (), {}, type(m).__name__) for m in modules])
    for site in cls.sites:  # type: ignore[attr-defined]
        yield from _runs_of(_calls.calls_of(site, module))


_NO_CODE = (lambda: None).__code__


def _runs_of(calls: list[_calls.Called]) -> Iterator[_Run]:
    pending: Any = None  # a layer, or a call of Unknown that may be one
    names: list[str] = []
    for call in [*calls, None]:
        unknown = call is not None and any(isinstance(v, _calls.Unknown) for v in (call.f, *call.args, *call.kwargs.values()))
        if isinstance(pending, _chain.Pending):
            why = "no LeakyReLU or ReLU follows it" if call is None else pending.add(call.f, call.args, call.kwargs)
            if not why and call is not None:
                names.append(_describe(call))
                continue
            if pending.calls:
                yield _Run(pending.layer, " + ".join(names), pending.row.op, "")
            elif unknown and call is not None:
                yield _Run(pending.layer, f"{names[0]} + {_describe(call)}", DECIDED, "")
            else:
                yield _Run(pending.layer, names[0], "", why if call is None else f"{why}, but {_describe(call)}")
        elif pending is not None and call is not None and (unknown or _chain.is_activation(call.f, call.args, call.kwargs)):
            yield _Run(None, f"{names[0]} + {_describe(call)}", DECIDED, "")
        pending, names = None, [] if call is None else [_describe(call)]
        if call is not None:
            row = _chain.layer_row(call.f)
            pending = call if isinstance(call.f, _calls.Unknown) else None if row is None else _chain.Pending(row, call.f, None)


def _describe(call: _calls.Called) -> str:
    """How a call reads in a report."""
    if isinstance(call.f, nn.LeakyReLU):
        return f"{type(call.f).__name__}({call.f.negative_slope})"
    return type(call.f).__name__ if isinstance(call.f, nn.Module) else call.what


def _why_not_fused(module: nn.Module) -> str:
    """Why a module in which something could be fused is not."""
    if "forward" in module.__dict__:
        return f"the {type(module).__name__} that calls it has a forward of its own"
    if parametrize.is_parametrized(module):
        return f"the {type(module).__name__} that calls it is parametrised"
    return "fuse was not called"


def _why_alone(layer: nn.Module, path: str, model: nn.Module) -> str:
    """Why a layer is in no chain of calls that was found."""
    if _chain.layer_row(layer) is None:
        lazy = isinstance(layer, LazyModuleMixin)
        return "it has not seen its first input yet" if lazy else f"{type(layer).__name__} is a class of its own"
    if not path:
        return "nothing calls it but you"
    parent = model.get_submodule(path.rpartition(".")[0])
    cls = parent.unfused if isinstance(parent, Fused) else type(parent)
    while isinstance(parent, (nn.ModuleList, nn.ModuleDict)) and path.count("."):
        path = path.rpartition(".")[0]
        parent = model.get_submodule(path.rpartition(".")[0])
        cls = parent.unfused if isinstance(parent, Fused) else type(parent)
    for name, function in _methods(cls):
        try:
            _rewrite.rewrite(function)
        except _rewrite.Refused as refused:
            return f"{cls.__name__}.{name} was not read: {refused}"
        if variable := _rewrite.changed_in_place(function, path.rpartition(".")[2]):
            return f"{cls.__name__}.{name} keeps its result in {variable}, which it changes in place"
    return f"{cls.__name__}.forward calls no LeakyReLU or ReLU on its result"
