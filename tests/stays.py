"""Count the stays of a reader who follows one parameter through a program's calls.

The reader follows the parameter and every object that is made of it, depth first, in the order of
the source.

An object is made of another where a class or another package's function gets that whole, as in
`Run(options)` and `parser.parse_args(argv)`, or where a function returns a followed object.  A
value that is taken out of an object (`options.lr`) is not followed, unless it is a followed object
that was put there.

A call that gets a followed object, or is a method of one, leads into the function that is called.
A stay begins where that function stands in another file than the one before.  A function that was
read already is looked up again, but its own calls are not followed again.
"""

import ast
import inspect
import textwrap
from pathlib import Path


class Walk:
    """Hold what the reader has seen: `stays` lists the files in order, with every return."""

    def __init__(self, root):
        self.root = root
        self.stays = []
        self.returned = {}  # {function that was read: class of the followed object it returns}
        self.kept = {}  # {attribute that holds a followed object: class of that object}

    def file_of(self, thing):
        """Return the path, from the root, of the file that defines a function or a class.

        None for what another package defines.
        """
        try:
            path = Path(inspect.getsourcefile(inspect.unwrap(thing)) or "")
        except TypeError:
            return None  # It is a value, or written in C.
        is_ours = self.root in path.parents and "site-packages" not in path.parts
        return str(path.relative_to(self.root)) if is_ours else None

    def arrive(self, thing):
        path = self.file_of(thing)
        if self.stays[-1:] != [path]:
            self.stays.append(path)

    def enter(self, function, followed):
        """Read a function and return the class of its result, or None.

        followed: {parameter: class} of those that are followed in it.
        """
        key = inspect.unwrap(getattr(function, "__func__", function))
        self.arrive(key)
        if key not in self.returned:
            self.returned[key] = None
            reader = Reader(self, function, followed)
            for statement in ast.parse(textwrap.dedent(inspect.getsource(key))).body[0].body:
                reader.visit(statement)
            self.returned[key] = reader.returned
        return self.returned[key]


class Reader(ast.NodeVisitor):
    """Read one function's body.

    The visit of an expression returns the class of the followed object that it gives, `object`
    where the class is unknown, or None where nothing is followed.
    """

    def __init__(self, walk, function, followed):
        self.walk = walk
        self.names = dict(followed)
        self.module_names = dict(vars(inspect.getmodule(function)))
        self.returned = None
        if inspect.isclass(getattr(function, "__self__", None)):
            self.module_names["cls"] = function.__self__

    def visit_Name(self, node):
        return self.names.get(node.id)

    def visit_Attribute(self, node):
        return self.walk.kept.get(node.attr) if self.visit(node.value) else None

    def visit_Starred(self, node):
        return self.visit(node.value)

    def visit_BoolOp(self, node):
        return self.first(node.values)

    def visit_IfExp(self, node):
        self.visit(node.test)
        return self.first([node.body, node.orelse])

    def first(self, nodes):
        kinds = [self.visit(node) for node in nodes]
        return next(filter(None, kinds), None)

    def visit_Assign(self, node):
        kind = self.visit(node.value)
        for target in node.targets:
            self.bind(target, kind)

    def visit_NamedExpr(self, node):
        kind = self.visit(node.value)
        self.bind(node.target, kind)
        return kind

    def visit_withitem(self, node):
        kind = self.visit(node.context_expr)
        if node.optional_vars:
            self.bind(node.optional_vars, kind)

    def bind(self, target, kind):
        if isinstance(target, ast.Name) and kind:
            self.names[target.id] = kind
        elif isinstance(target, ast.Attribute) and kind:
            self.walk.kept[target.attr] = kind

    def visit_Return(self, node):
        if node.value:
            self.returned = self.visit(node.value) or self.returned

    def visit_FunctionDef(self, node):
        outer = self.returned
        self.generic_visit(node)
        self.returned = outer

    def look_up(self, node):
        """Return what a name, or a name's attribute, stands for in this module, or None."""
        if isinstance(node, ast.Name):
            return self.module_names.get(node.id)
        if isinstance(node, ast.Attribute):
            return getattr(self.look_up(node.value), node.attr, None)
        return None

    def visit_Call(self, node):
        receiver = self.visit(node.func.value) if isinstance(node.func, ast.Attribute) else None
        values = [self.visit(value) for value in node.args]
        named = {keyword.arg: self.visit(keyword.value) for keyword in node.keywords}
        followed = [kind for kind in (*values, *named.values()) if kind]
        callee = getattr(receiver, node.func.attr, None) if receiver else self.look_up(node.func)
        if not self.walk.file_of(callee):
            return followed[0] if followed else None
        if not followed and not receiver:
            return None
        if receiver and inspect.isfunction(vars(receiver).get(node.func.attr)):
            values.insert(0, receiver)
        return self.follow(callee, values, named)

    def follow(self, callee, values, named):
        """Enter a function or a class with these arguments; return the class of its result."""
        is_class = inspect.isclass(callee)
        given = dict(zip(inspect.signature(callee).parameters, values, strict=False)) | named
        given = {name: kind for name, kind in given.items() if kind}
        if not is_class:
            return self.walk.enter(callee, given)
        if self.walk.file_of(callee.__init__):
            self.walk.enter(callee.__init__, {"self": callee, **given})
        else:  # A dataclass keeps what it gets under the same names.
            self.walk.arrive(callee)
            self.walk.kept.update(given)
        return callee


def stays(function, parameter):
    """Return the files in which the reader stays who follows this parameter, in order.

    Paths count from the folder of the function's own file.
    """
    assert parameter in inspect.signature(function).parameters, (
        f"{function.__name__} has no parameter {parameter}"
    )
    walk = Walk(Path(inspect.getsourcefile(function)).parent)
    walk.enter(function, {parameter: object})
    return walk.stays
