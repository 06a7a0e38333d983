"""Check that a pickle does nothing but what torch.save's own pickles do.

torch.load(weights_only=True) runs no code of a pickle, but it can be made to copy, hash, print or
walk through things without end, and to ask for any amount of memory.
"""
import pickletools

# The opcodes that make a value out of nothing, with the kind of that value.
CONSTANTS = {
    "BINUNICODE": "text", "BININT": "int", "BININT1": "int", "BININT2": "int",
    "NEWTRUE": "bool", "NEWFALSE": "bool", "NONE": "value", "BINFLOAT": "value",
    "EMPTY_DICT": "dict", "EMPTY_LIST": "value", "EMPTY_TUPLE": "shape",
}
# The opcodes that take values from the stack, and how many; None: all since the last MARK.
TAKEN = {
    "TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "APPENDS": None,
    "SETITEM": 2, "SETITEMS": None, "BINPERSID": 1, "REDUCE": 2, "BUILD": 2,
}
# The classes and functions that may be named.
STORAGES = ("Double", "Float", "BFloat16", "Half", "Long", "Int", "Short", "Char", "Byte")
GLOBALS = {
    **{f"torch {name}Storage": "storage_type" for name in STORAGES},
    "collections OrderedDict": "OrderedDict",
    "torch._utils _rebuild_tensor_v2": "_rebuild_tensor_v2",
    "torch._utils _rebuild_parameter": "_rebuild_parameter",
}
# The calls that torch.save writes: an opcode with the kinds that it takes, and the kind it leaves.
CALLS = {
    "TUPLE text storage_type text text int": "storage_id",
    "BINPERSID storage_id": "storage",
    "REDUCE OrderedDict shape": "dict",
    "BUILD dict dict": "dict",
    "TUPLE storage int shape shape bool dict": "tensor_arguments",
    "REDUCE _rebuild_tensor_v2 tensor_arguments": "tensor",
    "TUPLE3 tensor bool dict": "parameter_arguments",
    "REDUCE _rebuild_parameter parameter_arguments": "tensor",
}


def check_pickle(pickled: bytes) -> None:
    """Raise ValueError for a pickle that does more than the pickles of torch.save do.

    The pickle is followed step by step, with the kind of each value in place of the value, so
    nothing is made.  A value that is fetched from the memo, unless it is text or a name, is of no
    special kind any more: no key and no argument.  So a few bytes cannot ask for many tensors, nor
    for a key of 2^60 tuples.
    """
    stack = []
    marks = []
    memo = {}
    reusable = {"text", *GLOBALS.values()}
    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1] if stack[-1] in reusable else "value"
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case name if name in TAKEN:
                start = marks.pop() if TAKEN[name] is None else len(stack) - TAKEN[name]
                stack[start:] = kinds_left(name, stack[start:])
            case "LONG1":
                # Of larger numbers many could have one hash, which would make a dict slow.
                stack.append("int" if argument.bit_length() < 61 else "value")
            case "GLOBAL":
                if argument not in GLOBALS:
                    raise ValueError(f"it calls {argument.replace(' ', '.')}")
                stack.append(GLOBALS[argument])
            case "PROTO" | "STOP":
                pass
            case name:
                raise ValueError(f"{name} in its pickle; torch reads protocols 2 and 3 alone")


def kinds_left(name: str, taken: list[str]) -> list[str]:
    """Return what an opcode leaves of the kinds it takes; raise ValueError if it must not."""
    if name in ("APPEND", "APPENDS"):
        return []
    if name in ("SETITEM", "SETITEMS"):
        if not {"text", "int"}.issuperset(taken[::2]):
            raise ValueError("a key is neither text nor a small whole number")
        return []
    call = " ".join([name, *taken])
    if call in CALLS:
        return [CALLS[call]]
    if name not in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        raise ValueError("it makes a call that torch.save does not")
    is_shape = len(taken) <= 8 and set(taken) == {"int"}
    return ["shape" if is_shape else "value"]
