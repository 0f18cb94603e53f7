"""The calls that a rewritten method makes of layers and activations, found without running it: what `fusion_report` reports."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from gankern.nn import _chain
from gankern.nn._rewrite import Rewriter, Site


class Unknown:
    """An object that only a call of the method would show; what: its source."""

    def __init__(self, what: str) -> None:
        self.what = what


class Called(NamedTuple):
    """A call of a chain: the object called (or Unknown), its further arguments, and how it is written."""

    f: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    what: str


def calls_of(site: Site, module: nn.Module) -> list[Called]:
    """The calls that a module makes at a site as it is now, in their order."""
    walker = _Walker(site.function, module)
    return [called for node in site.nodes for called in walker.calls(node)]


class _Walker:
    """Follows the statements of a site with what the module holds now."""

    def __init__(self, function: FunctionType, module: nn.Module) -> None:
        self.rewriter = Rewriter(function)
        closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self.globals = function.__globals__
        self.locals: dict[str, Any] = dict.fromkeys(self.rewriter.arguments, module)
        for name, cell in closure:
            with contextlib.suppress(ValueError):  # an empty cell
                self.locals[name] = cell.cell_contents

    def calls(self, node: Any) -> Iterator[Called]:
        if isinstance(node, ast.For):
            items = self.value(node.iter)
            if not isinstance(items, Iterable) or (isinstance(items, Iterator) and not isinstance(node.iter, ast.Call)):
                yield from (c for s in node.body for c in self.calls(s))
                return
            for item in items:
                self.bind(node.target, item)
                yield from (c for s in node.body for c in self.calls(s))
        elif isinstance(node, ast.If):
            test = self.value(node.test)
            branches = [*node.body, *node.orelse] if isinstance(test, Unknown) else node.body if test else node.orelse
            yield from (c for s in branches for c in self.calls(s))
        else:
            found = self.rewriter.chain(node.value if isinstance(node, ast.Assign) else node)
            assert found is not None
            for link in found[0]:
                f = getattr(_chain, link.helper.removeprefix("_gankern_")) if link.helper else self.value(link.f)
                args = tuple(self.value(a) for a in link.args)
                yield Called(f, args, {str(k.arg): self.value(k.value) for k in link.keywords}, ast.unparse(link.f))

    def bind(self, target: ast.expr, item: Any) -> None:
        if isinstance(target, ast.Name):
            self.locals[target.id] = item
        elif isinstance(target, ast.Tuple):
            for t, i in zip(target.elts, item, strict=False):
                self.bind(t, i)

    def value(self, node: ast.expr) -> Any:
        for n in ast.walk(node):
            if isinstance(n, ast.Name) and n.id in self.rewriter.known and n.id not in self.locals:
                return Unknown(ast.unparse(node))
        try:
            code = compile(ast.fix_missing_locations(ast.Expression(node)), "<gankern>", "eval")
            return eval(code, self.globals, self.locals)
        except Exception:
            return Unknown(ast.unparse(node))
