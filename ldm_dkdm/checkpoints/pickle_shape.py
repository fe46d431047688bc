"""Read the shape of a pickle without building it: the classes that it names, and how large its content becomes."""

import pickle
import pickletools
from collections.abc import Iterator
from typing import IO, Any

OPCODES = 1_000_000  # most opcodes in a file; a network of 10,000 tensors and its optimizer have 600,000
EXPANDED = 3_000_000  # objects, where shared ones count as often as they occur: what hashing and searching visit
DEPTH = 1000  # containers within each other: hashing tuples a million deep would end the interpreter
NAMES = 10_000  # classes and functions
FAR = 10**6  # largest accepted gap in memo numbers; picklers count one by one

EMPTY = ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET")
GROW = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS")  # their first operand stays, with more content
PUT = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
GET = ("GET", "BINGET", "LONG_BINGET")
MARK = object()
Node = list[Any]  # a container: its number of plain values, then its containers


class PickleShape:
    """Follows the opcodes of a file's pickles, as pickletools describes them.

    Attributes:
        names: `module.name` of every class and function that the pickles ask for.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._count = 0
        self._containers: list[Node] = []

    def read(self, file: IO[bytes]) -> None:
        """Follow one pickle, and leave the file behind it.

        Raises:
            pickle.UnpicklingError: more opcodes, names, depth or shared content than weights have.
            Exception: damage can raise anything.
        """
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            self._count += 1
            if self._count > OPCODES:
                raise pickle.UnpicklingError(f"it holds more than {OPCODES} objects; save its state_dict() alone")
            self._follow(opcode, argument, stack, memo)
        self._measure()
        self._containers.clear()

    def _follow(self, opcode: pickletools.OpcodeInfo, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
        name = opcode.name
        if name in PUT:
            memo[_place(memo, argument)] = stack[-1]
        elif name in GET:
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(MARK)
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("GLOBAL", "INST"):
            self._ask(argument.replace(" ", ".", 1))
            _operands(opcode, stack)
            stack.append(None)
        elif not opcode.stack_before:
            stack += [self._new([]) if name in EMPTY else argument if isinstance(argument, str) else None] * len(
                opcode.stack_after
            )
        else:
            self._combine(opcode, _operands(opcode, stack), stack)

    def _combine(self, opcode: pickletools.OpcodeInfo, taken: list[Any], stack: list[Any]) -> None:
        """The effect of an opcode that takes operands off the stack."""
        if opcode.name in GROW or opcode.name == "BUILD":
            if opcode.name != "BUILD" and isinstance(taken[0], list):  # BUILD's state becomes attributes
                _hold(taken[0], taken[1:])
            stack.append(taken[0])
        elif opcode.name == "STACK_GLOBAL":
            self._ask(".".join(map(str, taken)))
            stack.append(None)
        elif opcode.stack_after:
            stack.append(self._new(taken))

    def _new(self, content: list[Any]) -> Node:
        node: Node = [0]
        _hold(node, content)
        self._containers.append(node)
        return node

    def _ask(self, name: str) -> None:
        self.names.add(name)
        if len(self.names) > NAMES:
            raise pickle.UnpicklingError(f"it names more than {NAMES} classes")

    def _measure(self) -> None:
        """Refuse containers that hold themselves, nest too deeply, or become too large by sharing."""
        known: dict[int, tuple[int, int] | None] = {}  # size and depth; None while the container is open
        for root in self._containers:
            open_nodes = [] if id(root) in known else [root]
            while open_nodes:
                node = open_nodes[-1]
                if id(node) not in known:
                    known[id(node)] = None
                    open_nodes += _unknown(node, known)
                    continue
                open_nodes.pop()
                if known[id(node)] is None:
                    known[id(node)] = _size_and_depth(node, known)


def _unknown(node: Node, known: dict[int, tuple[int, int] | None]) -> Iterator[Node]:
    for part in node[1:]:
        if known.get(id(part), (0, 0)) is None:
            raise pickle.UnpicklingError("it holds a container that holds itself")
        if id(part) not in known:
            yield part


def _size_and_depth(node: Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    size, depth = 1 + node[0], 0
    for part in node[1:]:
        more, below = known[id(part)] or (0, 0)
        size, depth = size + more, max(depth, below)
    if depth >= DEPTH:
        raise pickle.UnpicklingError(f"its content is nested more than {DEPTH} deep")
    if size > EXPANDED:
        raise pickle.UnpicklingError("its containers share their content until they hold millions of objects")
    return size, depth + 1


def _hold(node: Node, content: list[Any]) -> None:
    parts = [part for part in content if isinstance(part, list)]
    node[0] += len(content) - len(parts)
    node += parts


def _place(memo: dict[int, Any], argument: int | None) -> int:
    place = len(memo) if argument is None else argument
    if place > FAR + 2 * len(memo):
        raise pickle.UnpicklingError(f"it numbers its objects up to {place}, which takes memory for nothing")
    return place


def _operands(opcode: pickletools.OpcodeInfo, stack: list[Any]) -> list[Any]:
    """What an opcode takes off the stack, in the order in which it was put there."""
    taken: list[Any] = []
    before = list(opcode.stack_before)
    if pickletools.markobject in before:
        while (top := stack.pop()) is not MARK:
            taken.append(top)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        taken.append(stack.pop())
    return taken[::-1]
