"""A method's source, rewritten so that its calls of layers and activations go through `gankern.nn._chain`.

    x = F.leaky_relu(self.fc1(x), 0.2)      x = finish(step(F.leaky_relu, step(self.fc1, x), 0.2))
    x = self.bn(self.conv(x))               x = step(self.bn, step(self.conv, x))
    if self.active:                         if self.active:
        x = self.act(x)                         x = step(self.act, x)
    return x                                x = finish(x)
                                            return x

Each call is made in its place and in its order, with arguments read when they were read before; only a plain PyTorch layer waits
for the calls just after it. So nothing that the method reads is baked in: numbers, flags, modules, random draws and branches stay
what they are at each call. (torch.fx would bake all but the modules, and refuse the branches.)

Where the result of a call waits in a variable, no other code runs and no exception is caught: a run of statements x = f(x), with if
and for around them whose tests and iterables call nothing, ends in x = finish(x) before anything else. Sources that are not what
runs (changed since, decorated, made at run time) are refused.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import operator
import sys
from collections import Counter
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

from gankern.nn import _chain

_FUNCTIONS = frozenset({"leaky_relu", "leaky_relu_", "relu", "relu_", "dropout"})
_CONTEXTS = frozenset(
    {"no_grad", "enable_grad", "set_grad_enabled", "inference_mode", "autocast", "record_function"}
)  # swallow nothing
_QUIET_CALLS = frozenset({"enumerate", "hasattr", "isinstance", "len", "range", "reversed", "zip"})
_HELPERS = {"_gankern_step": _chain.step, "_gankern_finish": _chain.finish, "_gankern_relu": _chain.relu}
_HELPERS["_gankern_relu_"] = _chain.relu_
_FUTURE_FLAGS = functools.reduce(operator.or_, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names))


class Refused(Exception):
    """Why a method cannot be rewritten."""


class Site(NamedTuple):
    """Calls that follow each other: statements x = f(x) of the original, or one expression f(g(x))."""

    nodes: list[Any]  # ast.stmt or ast.expr
    function: Any  # the method as it was


@functools.lru_cache(maxsize=256)
def rewrite(function: Any) -> tuple[FunctionType, list[Site]]:
    """The function that does the same through `step`, and where; the same function if there is nothing to rewrite.

    Args:
        function: a method as it stands in a class's namespace.

    Raises:
        Refused: its source cannot be read or is not what runs.
    """
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        raise Refused("it is decorated, or not a Python function")
    code = function.__code__
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise Refused("it is a generator or a coroutine")
    unit, method = _parse(function)
    rewriter = Rewriter(function)
    rewriter.scan(method.body)
    method.body = rewriter.block(method.body)
    if not rewriter.sites:
        return function, []
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: CellType(value) for name, value in _HELPERS.items()}
    new = _compile(_with_helpers(unit, method), function)
    closure = tuple(cells[name] for name in new.co_freevars)
    made = FunctionType(new, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made, rewriter.sites


def changed_in_place(function: Any, attribute: str) -> str:
    """The variable in which a method that `rewrite` takes keeps what it makes of self.attribute, if it changes it in place."""
    _, method = _parse(function)
    rewriter = Rewriter(function)
    rewriter.scan(method.body)
    for s in ast.walk(method):
        nodes = list(ast.walk(s)) if isinstance(s, (ast.Assign, ast.For)) else []
        if any(isinstance(n, ast.Attribute) and n.attr == attribute for n in nodes):
            kept = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id in rewriter.mutated]
            if kept:
                return kept[0]
    return ""


def _parse(function: FunctionType) -> tuple[ast.Module, ast.FunctionDef]:
    """The source that the running code is compiled from, and the method in it."""
    try:
        tree = ast.parse("".join(inspect.findsource(function)[0]))
    except (OSError, TypeError, SyntaxError):
        raise Refused("its source cannot be read") from None
    line = function.__code__.co_firstlineno
    whole = [n for n in tree.body if n.lineno <= line <= (n.end_lineno or 0)]  # in a notebook each statement is compiled by itself
    for unit in (tree, ast.Module(whole, [])):
        defs = [n for n in ast.walk(unit) if isinstance(n, ast.FunctionDef) and n.lineno == line and n.name == function.__name__]
        if len(defs) == 1 and _same(_compile(unit, function), function.__code__):
            return unit, defs[0]
    raise Refused("its source is not what runs")


def _with_helpers(unit: ast.Module, method: ast.FunctionDef) -> ast.Module:
    """The unit with the method defined in a function whose arguments are the helpers."""

    class Visitor(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            if node is not method:
                return self.generic_visit(node)
            (factory,) = ast.parse(f"def factory({', '.join(_HELPERS)}): pass").body
            factory.body = [node]  # type: ignore[attr-defined]
            return factory

    return ast.fix_missing_locations(Visitor().visit(unit))


def _compile(unit: ast.Module, function: FunctionType) -> CodeType:
    """The function's code, compiled with all that surrounds it, on which details of it depend."""
    old = function.__code__
    todo = [compile(unit, old.co_filename, "exec", old.co_flags & _FUTURE_FLAGS, dont_inherit=True)]
    while todo:
        code = todo.pop()
        if (code.co_name, code.co_firstlineno) == (old.co_name, old.co_firstlineno):
            return code.replace(co_qualname=old.co_qualname) if sys.version_info >= (3, 11) else code
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
    raise Refused("its source is not what runs")


def _same(a: CodeType, b: CodeType) -> bool:
    """Whether two codes do the same."""
    parts: tuple[str, ...] = (
        "co_code",
        "co_flags",
        "co_names",
        "co_varnames",
        "co_freevars",
        "co_cellvars",
        "co_argcount",
        "co_posonlyargcount",
    )
    parts = (*parts, "co_kwonlyargcount", "co_exceptiontable")
    if any(getattr(a, part, None) != getattr(b, part, None) for part in parts) or len(a.co_consts) != len(b.co_consts):
        return False
    for x, y in zip(a.co_consts, b.co_consts, strict=True):
        if isinstance(x, CodeType) and isinstance(y, CodeType):
            if not _same(x, y):
                return False
        elif repr(x) != repr(y):
            return False
    return True


# --- which calls are links of a chain -------------------------------------------------------------------------------------------


class Link(NamedTuple):
    """f(_, *args, **keywords); name: of a helper where the call is written _.relu()."""

    f: ast.expr
    args: list[ast.expr]
    keywords: list[ast.keyword]
    helper: str = ""


def _mentions(node: ast.AST, name: str) -> int:
    return sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def _quiet(node: ast.AST, calls: frozenset[str] = frozenset()) -> bool:
    """Whether evaluating it runs no code but attribute access, subscripts, operators and the builtins named."""
    loud = (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.Starred, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp)
    for n in ast.walk(node):
        if isinstance(n, (*loud, ast.GeneratorExp)):
            return False
        if isinstance(n, ast.Call) and not (isinstance(n.func, ast.Name) and n.func.id in calls):
            return False
    return True


def _changed_in_place(n: ast.AST) -> list[ast.AST]:
    """What x += y, x[i] = y, x.add_(y), relu_(x), f(x, inplace=True) or relu(x, True) change."""
    if isinstance(n, ast.AugAssign):
        return [n.target]
    if isinstance(n, ast.Subscript) and not isinstance(n.ctx, ast.Load):
        return [n.value]
    if not isinstance(n, ast.Call):
        return []
    method, name = isinstance(n.func, ast.Attribute), _name(n.func)
    flag = any(k.arg == "inplace" for k in n.keywords)
    flag = flag or ("relu" in name and any(isinstance(a, ast.Constant) and a.value is True for a in n.args))
    return [*([n.func.value] if method and name.endswith("_") else []), *(n.args[:1] if flag or name.endswith("_") else [])]  # type: ignore[attr-defined]


def _name_of_call(node: ast.expr) -> str:
    return _name(node.func) if isinstance(node, ast.Call) else ""


def _name(f: ast.expr) -> str:
    return f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else ""


class Rewriter:
    """Which calls of one function are links of chains, and the statements rewritten."""

    def __init__(self, function: FunctionType) -> None:
        code = function.__code__
        self.function = function
        self.arguments = code.co_varnames[:1]
        self.known = frozenset((*code.co_varnames, *code.co_cellvars, *code.co_freevars))
        self.locals = frozenset(code.co_varnames) - frozenset(code.co_cellvars)  # none of them read by another function
        self.sites: list[Site] = []
        self.loads: Counter[str] = Counter()
        self.mutated: set[str] = set()

    def scan(self, body: list[ast.stmt]) -> None:
        """How often each variable is read, and which ones hold tensors that are changed in place: there a layer and its activation
        stay two, since autograd may have kept the result of the one op that they would become."""
        nodes = [n for s in body for n in ast.walk(s)]
        exempt: set[int] = set()  # x = relu(x, inplace=True): the activation that follows
        for n in nodes:
            if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name):
                calls = [c for c in ast.walk(n.value) if isinstance(c, ast.Call) and _name(c.func) in _FUNCTIONS]
                exempt |= {id(a) for c in calls for a in c.args[:1] if isinstance(a, ast.Name) and a.id == n.targets[0].id}
        for n in nodes:
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load):
                self.loads[n.id] += 1
            elif isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name):
                self.loads[n.target.id] += 1
            self.mutated |= {t.id for t in _changed_in_place(n) if isinstance(t, ast.Name) and id(t) not in exempt}
        self.locals -= self.mutated

    # --- expressions

    def link(self, node: ast.AST) -> tuple[Link, ast.expr] | None:
        """One call as a link and the expression it is called on, or None where it must stay as it stands."""
        if not isinstance(node, ast.Call):
            return None
        f = node.func
        if isinstance(f, ast.Attribute) and f.attr in ("relu", "relu_") and not node.args and not node.keywords:
            on_result = self.link(f.value) is not None
            on_local = isinstance(f.value, ast.Name) and f.value.id in self.locals and f.value.id not in self.arguments
            return (Link(f, [], [], f"_gankern_{f.attr}"), f.value) if on_result or on_local else None
        if not node.args or isinstance(node.args[0], ast.Starred) or not self.callee(f):
            return None
        rest = [*node.args[1:], *node.keywords]
        if any(not _quiet(r) for r in rest) or any(k.arg is None for k in node.keywords):
            return None
        return Link(f, node.args[1:], node.keywords), node.args[0]

    def callee(self, f: ast.expr) -> bool:
        """A local variable, what is read off one, or a function named like an activation."""
        if not _quiet(f):
            return False
        if _name(f) in _FUNCTIONS:
            return True
        while isinstance(f, (ast.Attribute, ast.Subscript)):
            f = f.value
        return isinstance(f, ast.Name) and f.id in self.known

    def chain(self, node: ast.AST) -> tuple[list[Link], ast.expr] | None:
        """Calls on each other's result, the first one first, and the expression that the first is called on."""
        links: list[Link] = []
        while (found := self.link(node)) is not None:
            link, node = found
            links.insert(0, link)
        return (links, node) if links else None  # type: ignore[return-value]

    def steps(self, links: list[Link], on: ast.expr, close: bool, waiting: str = "") -> ast.expr:
        """finish(step(f2, step(f1, on))); the call that was there gives the place in the source."""
        made: ast.expr = self.expression(on, waiting)
        for link in links:
            f = ast.Name(link.helper, ast.Load()) if link.helper else link.f
            made = ast.Call(ast.Name("_gankern_step", ast.Load()), [f, made, *link.args], link.keywords)
            ast.copy_location(made, link.f)
        return ast.copy_location(ast.Call(ast.Name("_gankern_finish", ast.Load()), [made], []), made) if close else made

    def expression(self, node: Any, waiting: str = "") -> Any:
        """Chains of two calls or more, and those on the variable that waits, rewritten wherever they are in it."""
        rewriter = self

        class Visitor(ast.NodeTransformer):
            def visit_Call(self, node: ast.Call) -> ast.AST:
                found = rewriter.chain(node)
                if found is None:
                    return self.generic_visit(node)
                links, on = found
                waits = isinstance(on, ast.Name) and on.id == waiting
                if len(links) > 1 and not waits:
                    rewriter.sites.append(Site(copy.deepcopy([node]), rewriter.function))
                if len(links) > 1 or waits:
                    return rewriter.steps(links, on, True, waiting)
                return self.generic_visit(node)

            def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
                return node

            visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_Lambda  # type: ignore[assignment]

        return Visitor().visit(node)

    # --- statements

    def on_itself(self, s: ast.stmt) -> str:
        """x, if the statement does nothing but x = f(x), also under if and for; else ""."""
        if isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name):
            found, name = self.chain(s.value), s.targets[0].id
            on_itself = found is not None and isinstance(found[1], ast.Name) and found[1].id == name
            return name if on_itself and name in self.locals and _mentions(s, name) == 2 else ""
        if isinstance(s, ast.If) or (isinstance(s, ast.For) and not s.orelse and self.plain_loop(s)):
            names = {self.on_itself(b) for b in [*s.body, *s.orelse]}
            head = s.test if isinstance(s, ast.If) else ast.Tuple([s.target, s.iter], ast.Load())
            if len(names) == 1 and (name := names.pop()) and not _mentions(head, name) and _quiet(head, _QUIET_CALLS):
                return name
        return ""

    def plain_loop(self, s: ast.For) -> bool:
        return all(isinstance(n, (ast.Name, ast.Tuple, ast.expr_context)) for n in ast.walk(s.target)) and s.type_comment is None

    def opened(self, s: ast.stmt, waiting: str) -> str:
        """The variable that may wait after this statement, if it is x = f(...) and may follow or begin a run; else ""."""
        if not (isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name)):
            return ""
        name, found = s.targets[0].id, self.chain(s.value)
        if found is None or name not in self.locals:
            return ""
        _, on = found
        if not waiting:
            return name if not any(_mentions(part, name) for part in self.around(s.value, on)) else ""
        dead = name == waiting or self.loads[waiting] == 1
        alone = isinstance(on, ast.Name) and on.id == waiting and _mentions(s.value, waiting) == 1
        return name if alone and dead else ""

    def around(self, value: ast.expr, on: ast.expr) -> Iterator[ast.AST]:
        """The parts of a chain besides what it is called on."""
        found = self.chain(value)
        assert found is not None
        for link in found[0]:
            if not link.helper:
                yield link.f
            yield from link.args
            yield from link.keywords

    def open(self, s: ast.stmt) -> ast.stmt:
        """The statement, its results left to wait."""
        if isinstance(s, ast.Assign):
            found = self.chain(s.value)
            assert found is not None
            return ast.copy_location(ast.Assign(s.targets, self.steps(*found, close=False), s.type_comment), s)
        assert isinstance(s, (ast.If, ast.For))
        body, orelse = [self.open(b) for b in s.body], [self.open(b) for b in s.orelse]
        if isinstance(s, ast.If):
            return ast.copy_location(ast.If(s.test, body, orelse), s)
        return ast.copy_location(ast.For(s.target, s.iter, body, orelse, s.type_comment), s)

    def closes(self, s: ast.stmt | None, waiting: str) -> ast.expr | None:
        """The calls on what waits, if the statement makes them first of all, and it is not read again."""
        if not isinstance(s, (ast.Assign, ast.Return)) or s.value is None or _mentions(s.value, waiting) != 1:
            return None
        if isinstance(s, ast.Assign) and any(self.is_mutated(t) for t in s.targets):
            return None
        assigned = isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name)
        if not (isinstance(s, ast.Return) or self.loads[waiting] == 1 or (assigned and s.targets[0].id == waiting)):  # type: ignore[attr-defined]
            return None
        node: ast.expr = s.value
        while isinstance(node, ast.Call):
            found = self.chain(node)
            if found is not None:
                if isinstance(found[1], ast.Name):
                    return node if found[1].id == waiting else None
                node = found[1]
            elif isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name):
                node = node.func.value
            elif node.args and _quiet(node.func):
                node = node.args[0]
            else:
                return None
        return None

    def block(self, statements: list[ast.stmt], runs: bool = True) -> list[ast.stmt]:
        """A list of statements rewritten; `runs` False: no result may wait from one statement to the next."""
        made: list[ast.stmt] = []
        i = 0
        while i < len(statements):
            run, waiting = self.run(statements[i:]) if runs else ([], "")
            if not run:
                made.append(self.other(statements[i], runs))
                i += 1
                continue
            i += len(run)
            last = statements[i] if i < len(statements) else None
            closing = self.closes(last, waiting)
            if len(run) == 1 and closing is None and not isinstance(run[0], ast.For) and self.links(run[0]) < 2:
                made.append(self.other(run[0], runs))
                continue
            self.sites.append(Site(copy.deepcopy([*run, *([] if closing is None else [closing])]), self.function))
            made += [self.open(s) for s in run]
            if closing is not None and last is not None:
                last.value = self.expression(last.value, waiting)  # type: ignore[attr-defined]
                made.append(last)
                i += 1
            else:
                finish = ast.parse(f"{waiting} = _gankern_finish({waiting})").body[0]
                for n in ast.walk(finish):
                    ast.copy_location(n, run[-1])
                made.append(finish)
        return made

    def run(self, statements: list[ast.stmt]) -> tuple[list[ast.stmt], str]:
        """The longest run that begins here, and the variable that waits at its end."""
        run: list[ast.stmt] = []
        waiting = ""
        for s in statements:
            name = self.on_itself(s)
            if not name or (waiting and name != waiting):
                name = self.opened(s, waiting)
            if not name:
                break
            run.append(s)
            waiting = name
        return run, waiting

    def links(self, s: ast.stmt) -> int:
        if isinstance(s, ast.Assign):
            found = self.chain(s.value)
            return len(found[0]) if found else 0
        return sum(self.links(b) for b in [*getattr(s, "body", []), *getattr(s, "orelse", [])])

    def other(self, s: ast.stmt, runs: bool) -> ast.stmt:
        """Any other statement: its expressions and its blocks, each by itself."""
        targets = s.targets if isinstance(s, ast.Assign) else []
        if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or any(self.is_mutated(t) for t in targets):
            return s
        swallows = isinstance(s, (ast.With, ast.AsyncWith)) and not all(_name_of_call(i.context_expr) in _CONTEXTS for i in s.items)
        runs = runs and not swallows and not isinstance(s, ast.Try) and type(s).__name__ != "TryStar"
        for field, value in ast.iter_fields(s):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(s, field, self.block(value, runs))
            elif isinstance(value, list):
                setattr(s, field, [self.part(v, runs) for v in value])
            elif isinstance(value, ast.AST):
                setattr(s, field, self.expression(value))
        return s

    def is_mutated(self, target: ast.expr) -> bool:
        return isinstance(target, ast.Name) and target.id in self.mutated

    def part(self, node: Any, runs: bool) -> Any:
        if isinstance(node, (ast.ExceptHandler, ast.match_case)):
            node.body = self.block(node.body, runs)
            return node
        return self.expression(node) if isinstance(node, ast.AST) else node
