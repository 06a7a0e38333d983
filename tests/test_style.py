"""How shipped code reads: one statement does one thing, and no line is a riddle.

pytest -m house
"""

import ast

import pytest

from .helpers import ROOT, shipped

pytestmark = pytest.mark.house

COLUMNS = 100
LARGEST_SIGNATURE = 6
OPTIONAL = {"safetensors", "matplotlib", "PIL"}  # packages that a function may import by itself
OPTIONS = ("finetune/options.py",)  # where the options are made, and so may be changed
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def is_written_out(node):
    """Tell whether an expression is text, bytes, a list or a tuple for all to see."""
    if isinstance(node, ast.BinOp):
        return is_written_out(node.left) or is_written_out(node.right)
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    return is_text or isinstance(node, ast.List | ast.Tuple | ast.JoinedStr)


def is_true_or_false(node):
    """Tell whether an expression is a bool by its form, whatever its names hold."""
    if isinstance(node, ast.Compare):
        return isinstance(node.ops[0], ast.In | ast.NotIn | ast.Is | ast.IsNot)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("bool", "isinstance", "any", "all")
    return isinstance(node, ast.BoolOp) or is_not(node)


def is_not(node):
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def is_minus(node):
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


def is_call(node, name):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == name


def one_thing(node, _):
    """1. One statement does one thing."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
        return any(isinstance(target, ast.Tuple) for target in node.targets)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple)


def one_line_each(node, parents):
    """1. Two statements stand on two lines."""
    if not isinstance(node, ast.stmt):
        return False
    around = (parents[node], *ast.iter_child_nodes(parents[node]))
    others = [each for each in around if each is not node and isinstance(each, ast.stmt)]
    return node.lineno in [each.lineno for each in others]


def one_loop(node, _):
    """2. A comprehension has one `for`, at most one `if`, nothing nested."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    inner = [each for each in ast.walk(node) if isinstance(each, COMPREHENSIONS)]
    return len(node.generators) > 1 or len(node.generators[0].ifs) > 1 or len(inner) > 1


def choose_with_if(node, _):
    """3. Choose with `if`, never by multiplying or indexing by a condition."""
    if isinstance(node, ast.Subscript) and is_written_out(node.value):
        return any(is_true_or_false(each) for each in ast.walk(node.slice))
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return False
    for value, condition in ((node.left, node.right), (node.right, node.left)):
        if is_true_or_false(condition):
            return True
        if is_written_out(value) and isinstance(condition, ast.Compare):
            return True
    return False


def plain_walrus(node, parents):
    """4. A walrus stands only around a plain call in `if` or `while`."""
    if not isinstance(node, ast.NamedExpr):
        return False
    child = node
    while not isinstance(child, (ast.stmt, ast.Lambda, *COMPREHENSIONS)):
        inner, child = child, parents[child]
    is_test = isinstance(child, ast.If | ast.While) and child.test is inner
    return not is_test or not isinstance(node.value, ast.Call)


def no_riddle(node, _):
    """5. A riddle of the standard library gets a name, or is spelled out."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.List | ast.Tuple):
        return any(isinstance(each, ast.Starred) for each in node.value.elts)  # [*xs, y][0]
    if is_call(node, "map"):
        zips = [each for each in node.args if is_call(each, "zip")]
        return any(isinstance(each, ast.Starred) for zipped in zips for each in zipped.args)
    if is_minus(node) and isinstance(node.operand, ast.BinOp):
        return isinstance(node.operand.op, ast.FloorDiv) and is_minus(node.operand.left)
    if isinstance(node, ast.For | ast.comprehension):
        values = getattr(node.iter, "elts", ())  # for x in [value]
        return len(values) == 1 and not isinstance(values[0], ast.Starred)
    return False


def six_parameters(node, _):
    """11. A function has at most six parameters, keyword-only ones apart."""
    if not isinstance(node, ast.FunctionDef):
        return False
    names = {each.arg for each in (*node.args.posonlyargs, *node.args.args)}
    return len(names - {"self", "cls"}) > LARGEST_SIGNATURE


def no_bag(node, _):
    """11. A function does not change the options that it is given."""
    if not isinstance(node, ast.FunctionDef):
        return False
    bags = {each.arg for each in node.args.args} & {"args", "options"}
    for inner in ast.walk(node):
        text = ast.unparse(inner) if isinstance(inner, ast.expr) else ""
        is_stored = isinstance(getattr(inner, "ctx", None), ast.Store)
        for bag in bags:
            is_changed = text.startswith((f"setattr({bag},", f"vars({bag}).update("))
            if is_changed or is_stored and text.startswith(f"{bag}."):
                return True
    return False


def written_imports(node, parents):
    """12. Imports are written out."""
    if is_call(node, "importlib.import_module") or is_call(node, "__import__"):
        return True
    if isinstance(node, ast.FunctionDef) and isinstance(parents[node], ast.Module):
        return node.name == "__getattr__"
    return isinstance(node, ast.ImportFrom) and node.names[0].name == "*"


def imports_at_the_top(node, parents):
    """12. A function imports nothing but an optional package, or inside `try`."""
    if not isinstance(node, ast.Import | ast.ImportFrom) or isinstance(parents[node], ast.Try):
        return False
    place = parents[node]
    while not isinstance(place, ast.FunctionDef | ast.Module):
        place = parents[place]
    names = [getattr(node, "module", None) or alias.name for alias in node.names]
    is_optional = all(name.partition(".")[0] in OPTIONAL for name in names)
    return isinstance(place, ast.FunctionDef) and not is_optional


RULES = (
    one_thing,
    one_line_each,
    one_loop,
    choose_with_if,
    plain_walrus,
    no_riddle,
    six_parameters,
    no_bag,
    written_imports,
    imports_at_the_top,
)
CLEAN = shipped()


def breaches(code, rule):
    """Return the numbers of the lines that break a rule."""
    tree = ast.parse(code)
    parents = {}
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            parents[child] = node
    broken = [node for node in ast.walk(tree) if rule(node, parents)]
    return [getattr(node, "target", node).lineno for node in broken]


def breaches_of(path, rule):
    if rule is no_bag and path in OPTIONS:
        return []
    return breaches((ROOT / path).read_text(), rule)


def long_lines(path):
    lines = (ROOT / path).read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", CLEAN)
def test_a_file_keeps_a_rule(path, rule):
    lines = [f"{path}:{number}" for number in breaches_of(path, rule)]
    assert not lines, f"{', '.join(lines)}: {rule.__doc__}"


@pytest.mark.parametrize("path", [*CLEAN, *shipped("tests")])
def test_no_line_passes_100_columns(path):
    assert not long_lines(path)


@pytest.mark.parametrize("code, rule", [
    ("a, b = 1, 2", one_thing),
    ("a, b = pair()", None),
    ("a = 1; b = 2", one_line_each),
    ("if x: y = 1", one_line_each),
    ("x = 1\ny = 2", None),
    ("[x for a in b for x in a]", one_loop),
    ("[x for a in b if a if c]", one_loop),
    ("[[x for x in a] for a in b]", one_loop),
    ("[x for x in a if b and c]", None),
    ("'a' * (n > 1)", choose_with_if),
    ("[a, b][x is None]", choose_with_if),
    ("loss * (labels != 3)", None),
    ("if match := f(x):\n    pass", None),
    ("while (piece := f(x)) is not None:\n    pass", None),
    ("y = (match := f(x))", plain_walrus),
    ("if any((last := f(x)) for x in y):\n    pass", plain_walrus),
    ("[*a, b][0]", no_riddle),
    ("[*map(max, zip(*rows))]", no_riddle),
    ("-(-a // b)", no_riddle),
    ("[f(x) for x in [y]]", no_riddle),
    ("def f(a, b, c, d, e, f, g):\n    pass", six_parameters),
    ("def f(self, a, b, c, d, e, f, *, g):\n    pass", None),
    ("def f(args):\n    args.x = 1", no_bag),
    ("args = f()\nargs.x = 1", None),
    ("def __getattr__(name):\n    pass", written_imports),
    ("from x import *", written_imports),
    ("def f():\n    import torch", imports_at_the_top),
    ("def f():\n    import safetensors.torch", None),
    ("try:\n    import fcntl\nexcept ImportError:\n    pass", None),
])  # fmt: skip
def test_a_rule_sees_what_breaks_it(code, rule):
    assert [each for each in RULES if breaches(code, each)] == ([rule] if rule else [])
