"""The rules a kernel package keeps so that the Hub can serve it, checked on its source without importing it.

Two versions of a kernel may be loaded into one process, on any Python from 3.9 on, with nothing but PyTorch and
Triton around. So imports are relative or from {standard library, torch, triton}, every op lives in the namespace that
``_ops.add_op_namespace_prefix`` gives this build, and a layer is nothing but a ``forward``: kernelize moves that
function onto another module. ``kernel-builder`` checks some of this and documents the rest.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ALLOWED_IMPORTS = {*sys.stdlib_module_names, "torch", "triton"}
OLDEST_PYTHON = (3, 9)
PREFIX = "add_op_namespace_prefix"
DEFINES_OP = {"custom_op", "triton_op"}
REGISTERS = {"register_kernel", "register_fake", "register_vmap", "register_torch_dispatch"}
LAYER_FLAGS = {"can_torch_compile", "has_backward"}


def violations(package: Path) -> list[str]:
    """Every rule that the package breaks, as ``file:line what is wrong``; empty when it keeps them all."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name, depth = path.relative_to(package).as_posix(), len(path.relative_to(package).parts)
        if name == "_ops.py":
            found.append("_ops.py:1 is written by the build and must not be in the source")
            continue
        try:
            tree = ast.parse(path.read_text(), feature_version=OLDEST_PYTHON)
        except SyntaxError as error:
            found.append(f"{name}:{error.lineno} is not Python {'.'.join(map(str, OLDEST_PYTHON))}: {error.msg}")
            continue
        checks = [*_imports(tree, depth), *_ops(tree, depth)]
        if name in ("layers.py", "layers/__init__.py"):
            checks += _layers(tree)
        if name == "__init__.py":
            checks += _public_names(tree)
        found += (f"{name}:{line} {what}" for line, what in checks)
    return found


def literal_all(tree: ast.Module) -> list[str] | None:
    """The names in ``__all__ = [...]``; None unless it is assigned a literal list of strings."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(_name(target) == "__all__" for target in node.targets):
            strings = isinstance(node.value, ast.List) and all(
                isinstance(item, ast.Constant) and isinstance(item.value, str) for item in node.value.elts
            )
            return [item.value for item in node.value.elts] if strings else None
    return None


def _public_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    names = literal_all(tree)
    if not names:
        yield 1, "must assign __all__ a literal list of strings: readers of the package never import it"
        return
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    bound = {alias.asname or alias.name for node in imports for alias in node.names}
    bound |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for name in sorted(set(names) - bound):
        yield 1, f"lists {name!r} in __all__ but does not define it"


def _imports(tree: ast.Module, depth: int) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > depth:
                yield node.lineno, "imports from above the package"
            continue
        modules = []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.split(".")[0] not in ALLOWED_IMPORTS:
                yield node.lineno, f"imports {module}; a kernel has only the standard library, torch, triton and itself"


def _ops(tree: ast.Module, depth: int) -> Iterator[tuple[int, str]]:
    imports = [node for node in tree.body if _is_prefix_import(node, depth)]
    for node in ast.walk(tree):
        if _binds_prefix(node) and node not in imports:
            yield node.lineno, f"must take {PREFIX} from ._ops at the top of the file, under its own name"
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.library.Library":
            yield node.lineno, "must define ops with torch.library.custom_op or triton_op, not Library"
        if isinstance(node, ast.Call) and _names_an_op(node):
            if not (node.args and isinstance(node.args[0], ast.Call) and _name(node.args[0].func) == PREFIX):
                yield node.lineno, f"must name its op with {PREFIX}(...): {ast.unparse(node)[:60]}"
            elif not imports:
                yield node.lineno, f"must import {PREFIX} from ._ops"
        for decorator in getattr(node, "decorator_list", []):
            if _registers_by_method(decorator):
                yield decorator.lineno, f"must call {_name(decorator.func)}(...)(function), not decorate with it"


def _names_an_op(call: ast.Call) -> bool:
    """Whether the call's first argument is an op's name: it defines one, or registers for one by name."""
    return _name(call.func) in DEFINES_OP or (_is_library(call.func) and _name(call.func).startswith("register_"))


def _registers_by_method(decorator: ast.expr) -> bool:
    """Whether it is ``@op.register_...(argument)``: kernel-builder takes the argument for an op's name and refuses."""
    return (
        isinstance(decorator, ast.Call)
        and bool(decorator.args)
        and _name(decorator.func) in REGISTERS
        and not _is_library(decorator.func)
    )


def _is_library(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and ast.unparse(function.value).endswith("library")


def _is_prefix_import(node: ast.stmt, depth: int) -> bool:
    """Whether it is ``from ._ops import add_op_namespace_prefix``, with the dots that lead to the package's top."""
    return (
        isinstance(node, ast.ImportFrom)
        and (node.module, node.level) == ("_ops", depth)
        and any((alias.name, alias.asname) == (PREFIX, None) for alias in node.names)
    )


def _binds_prefix(node: ast.AST) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return any(PREFIX in (alias.name, alias.asname) for alias in node.names)
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name == PREFIX
    return isinstance(node, ast.Name) and node.id == PREFIX and isinstance(node.ctx, ast.Store)


def _layers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for layer in tree.body:
        if not isinstance(layer, ast.ClassDef):
            continue
        if [_name(base) for base in layer.bases] != ["Module"]:
            yield layer.lineno, f"layer {layer.name} must derive from torch.nn.Module alone"
        for member in layer.body:
            if not _is_layer_member(member):
                yield (
                    member.lineno,
                    (
                        f"layer {layer.name} may hold annotations, {', '.join(sorted(LAYER_FLAGS))} and forward, "
                        f"not: {ast.unparse(member).splitlines()[0]}"
                    ),
                )


def _is_layer_member(member: ast.stmt) -> bool:
    if isinstance(member, ast.FunctionDef):
        return member.name == "forward"
    if isinstance(member, ast.AnnAssign):
        return member.value is None or (_name(member.target) in LAYER_FLAGS and _is_bool(member.value))
    if isinstance(member, ast.Assign):
        return {_name(target) for target in member.targets} <= LAYER_FLAGS and _is_bool(member.value)
    return isinstance(member, ast.Expr) and isinstance(member.value, ast.Constant)  # a docstring


def _is_bool(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _name(node: ast.expr) -> str:
    """The last part of a dotted name; empty for anything else."""
    return getattr(node, "id", None) or getattr(node, "attr", "")
