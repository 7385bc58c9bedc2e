"""A small language for vector kernels: Python builds LLVM IR for a function. Knows no kernel and no processor.

Values carry an LLVM type and overload Python's operators; a Python number beside a value takes its type. Addresses are 64-bit
integers. Loads and stores name their type and promise no alignment beyond the element's own, because tensors mapped from a
file may start anywhere. Nothing is reassociated: sums are rounded in the order written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
SIZES = {I8: 1, I16: 2, I32: 4, I64: 8, F16: 2, F32: 4}
POINTER = ir.PointerType()


def vector(element: ir.Type, lanes: int) -> ir.Type:
    return element if lanes == 1 else ir.VectorType(element, lanes)


def lanes_of(type: ir.Type) -> int:
    return type.count if isinstance(type, ir.VectorType) else 1


def element_of(type: ir.Type) -> ir.Type:
    return type.element if isinstance(type, ir.VectorType) else type


def constant(type: ir.Type, value: Any) -> ir.Constant:
    """A number as a constant of the type, the same in every lane; a sequence gives the lanes."""
    if isinstance(type, ir.VectorType):
        values = value if isinstance(value, Sequence) else [value] * type.count
        return ir.Constant(type, [constant(type.element, v) for v in values])
    return ir.Constant(type, float(value) if type in (F16, F32) else int(value))


class Value:
    """An SSA value of a function under construction."""

    __slots__ = ("code", "ir")

    def __init__(self, code: Code, value: ir.Value) -> None:
        self.code, self.ir = code, value

    @property
    def type(self) -> ir.Type:
        return self.ir.type

    @property
    def lanes(self) -> int:
        return lanes_of(self.ir.type)

    @property
    def is_float(self) -> bool:
        return element_of(self.ir.type) in (F16, F32)

    def _other(self, other: Any) -> ir.Value:
        return other.ir if isinstance(other, Value) else constant(self.ir.type, other)

    def _apply(self, integer: str, floating: str | None, other: Any, swapped: bool = False) -> Value:
        name = floating if self.is_float else integer
        assert name is not None, f"no {integer} of floats"
        a, b = (self._other(other), self.ir) if swapped else (self.ir, self._other(other))
        return Value(self.code, getattr(self.code.builder, name)(a, b))

    def __add__(self, other: Any) -> Value:
        return self._apply("add", "fadd", other)

    def __radd__(self, other: Any) -> Value:
        return self._apply("add", "fadd", other, swapped=True)

    def __sub__(self, other: Any) -> Value:
        return self._apply("sub", "fsub", other)

    def __rsub__(self, other: Any) -> Value:
        return self._apply("sub", "fsub", other, swapped=True)

    def __mul__(self, other: Any) -> Value:
        return self._apply("mul", "fmul", other)

    def __rmul__(self, other: Any) -> Value:
        return self._apply("mul", "fmul", other, swapped=True)

    def __truediv__(self, other: Any) -> Value:
        return self._apply("", "fdiv", other)

    def __rtruediv__(self, other: Any) -> Value:
        return self._apply("", "fdiv", other, swapped=True)

    def __floordiv__(self, other: Any) -> Value:
        """Unsigned division of integers."""
        return self._apply("udiv", None, other)

    def __mod__(self, other: Any) -> Value:
        """Unsigned remainder of integers."""
        return self._apply("urem", None, other)

    def __and__(self, other: Any) -> Value:
        return self._apply("and_", None, other)

    def __or__(self, other: Any) -> Value:
        return self._apply("or_", None, other)

    def __xor__(self, other: Any) -> Value:
        return self._apply("xor", None, other)

    def __lshift__(self, other: Any) -> Value:
        return self._apply("shl", None, other)

    def __rshift__(self, other: Any) -> Value:
        """Logical: zeros come in from the left."""
        return self._apply("lshr", None, other)

    def _compare(self, op: str, other: Any) -> Value:
        compare = self.code.builder.fcmp_ordered if self.is_float else self.code.builder.icmp_signed
        return Value(self.code, compare(op, self.ir, self._other(other)))

    def __lt__(self, other: Any) -> Value:
        return self._compare("<", other)

    def __gt__(self, other: Any) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Any) -> Value:
        return self._compare(">=", other)

    def equals(self, other: Any) -> Value:
        return self._compare("==", other)

    def select(self, yes: Any, no: Value) -> Value:
        """self ? yes : no, lane by lane."""
        return Value(self.code, self.code.builder.select(self.ir, no._other(yes), no.ir))

    def min(self, other: Any) -> Value:
        return (self < other).select(self, Value(self.code, self._other(other)))

    def max(self, other: Any) -> Value:
        return (self > other).select(self, Value(self.code, self._other(other)))

    def _cast(self, how: str, element: ir.Type) -> Value:
        return Value(self.code, getattr(self.code.builder, how)(self.ir, vector(element, self.lanes)))

    def bitcast(self, type: ir.Type) -> Value:
        """The same bits as another type of the same size."""
        return Value(self.code, self.code.builder.bitcast(self.ir, type))

    def extend(self, element: ir.Type) -> Value:
        """To a larger type: integers keep their sign."""
        return self._cast("fpext" if self.is_float else "sext", element)

    def zero_extend(self, element: ir.Type) -> Value:
        """To a larger integer type, as an unsigned number."""
        return self._cast("zext", element)

    def trunc(self, element: ir.Type) -> Value:
        """To a smaller type: the low bits of integers, the nearest float."""
        return self._cast("fptrunc" if self.is_float else "trunc", element)

    def as_float(self) -> Value:
        """Signed integers to float32."""
        return self._cast("sitofp", F32)

    def shuffle(self, lanes: Sequence[int], other: Value | None = None) -> Value:
        """Lanes by number; those of `other` come after those of self."""
        second = other.ir if other is not None else ir.Constant(self.ir.type, ir.Undefined)
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return Value(self.code, self.code.builder.shuffle_vector(self.ir, second, mask))

    def lane(self, index: int) -> Value:
        return Value(self.code, self.code.builder.extract_element(self.ir, ir.Constant(I32, index)))

    def splat(self, lanes: int) -> Value:
        """A scalar in every lane."""
        if lanes == 1:
            return self
        undefined = ir.Constant(ir.VectorType(self.ir.type, lanes), ir.Undefined)
        first = Value(self.code, self.code.builder.insert_element(undefined, self.ir, ir.Constant(I32, 0)))
        return first.shuffle([0] * lanes)

    def halves(self) -> tuple[Value, Value]:
        half = self.lanes // 2
        return self.shuffle(range(half)), self.shuffle(range(half, 2 * half))

    def reduce_add(self) -> Value:
        """Sum of the lanes, pairwise."""
        value = self
        while value.lanes > 2:
            low, high = value.halves()
            value = low + high
        return value.lane(0) + value.lane(1) if value.lanes == 2 else value

    def reduce_max(self) -> Value:
        """Largest lane of a float vector; NaN where one is NaN."""
        value = self
        while value.lanes > 2:
            low, high = value.halves()
            value = self.code.maximum(low, high)
        return self.code.maximum(value.lane(0), value.lane(1)) if value.lanes == 2 else value


class Variable:
    """A place that can be assigned: `value` reads and writes. Lives in a register once LLVM has optimized."""

    def __init__(self, code: Code, initial: Value) -> None:
        with code.builder.goto_entry_block():
            self._place = code.builder.alloca(initial.type)
        self._code, self._type = code, initial.type
        self.value = initial

    @property
    def value(self) -> Value:
        return Value(self._code, self._code.builder.load(self._place, typ=self._type))

    @value.setter
    def value(self, value: Value) -> None:
        self._code.builder.store(value.ir, self._place)


class Code:
    """One function under construction: int64 arguments in, int64 out (zero unless `ret` gives another)."""

    def __init__(self, module: ir.Module, name: str, arguments: int, exported: bool = True) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(I64, [I64] * arguments), name)
        if not exported:
            self.function.linkage = "internal"
        self.builder = ir.IRBuilder(self.function.append_basic_block())
        entry = self.builder.block  # holds the allocas; the code starts in a block of its own
        self.builder.position_at_end(body := self.function.append_basic_block())
        self._body, self._entry = body, entry
        self.arguments = [Value(self, a) for a in self.function.args]

    def ret(self, value: Value | int = 0) -> None:
        """Return; ends the function."""
        self.builder.ret(value.ir if isinstance(value, Value) else ir.Constant(I64, value))
        ir.IRBuilder(self._entry).branch(self._body)

    def constant(self, value: Any, type: ir.Type = I64) -> Value:
        return Value(self, constant(type, value))

    def variable(self, initial: Value) -> Variable:
        return Variable(self, initial)

    # Memory -----------------------------------------------------------------------------------------------------------

    def load(self, type: ir.Type, address: Value, offset: Any = 0) -> Value:
        where = self.builder.inttoptr((address + offset).ir, POINTER)
        loaded = self.builder.load(where, typ=type)
        loaded.align = SIZES[element_of(type)]
        return Value(self, loaded)

    def store(self, value: Value, address: Value, offset: Any = 0) -> None:
        where = self.builder.inttoptr((address + offset).ir, POINTER)
        self.builder.store(value.ir, where).align = SIZES[element_of(value.type)]

    def load_arguments(self, address: Value, count: int) -> list[Value]:
        """The first `count` int64 of a table of arguments."""
        return [self.load(I64, address, 8 * i) for i in range(count)]

    def prefetch(self, address: Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
        fetch = self._external("llvm.prefetch.p0", kind)
        numbers = [ir.Constant(I32, n) for n in (0, 0, 1)]  # for reading, without temporal locality, data
        self.builder.call(fetch, [self.builder.inttoptr(address.ir, POINTER), *numbers])

    # Control ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def for_range(self, start: Any, stop: Any, step: int = 1) -> Iterator[Value]:
        """for i in range(start, stop, step), int64."""
        first, last = (x if isinstance(x, Value) else self.constant(x) for x in (start, stop))
        before = self.builder.block
        body, after = self.function.append_basic_block(), self.function.append_basic_block()
        self.builder.cbranch((first < last).ir, body, after)
        self.builder.position_at_end(body)
        counter = self.builder.phi(I64)
        counter.add_incoming(first.ir, before)
        yield Value(self, counter)
        following = Value(self, counter) + step
        counter.add_incoming(following.ir, self.builder.block)
        self.builder.cbranch((following < last).ir, body, after)
        self.builder.position_at_end(after)

    @contextmanager
    def if_then(self, condition: Value) -> Iterator[None]:
        body, after = self.function.append_basic_block(), self.function.append_basic_block()
        self.builder.cbranch(condition.ir, body, after)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(after)
        self.builder.position_at_end(after)

    @contextmanager
    def loop(self) -> Iterator[Any]:
        """Repeat until the function it yields, `break_if(condition)`, finds its condition true."""
        body, after = self.function.append_basic_block(), self.function.append_basic_block()
        self.builder.branch(body)
        self.builder.position_at_end(body)

        def break_if(condition: Value) -> None:
            more = self.function.append_basic_block()
            self.builder.cbranch(condition.ir, after, more)
            self.builder.position_at_end(more)

        yield break_if
        self.builder.branch(body)
        self.builder.position_at_end(after)

    def call(self, function: Value | ir.Function, arguments: Sequence[Value]) -> Value:
        """Call a function of int64 arguments: one of this module, or one at an address."""
        if isinstance(function, Value):
            kind = ir.FunctionType(I64, [I64] * len(arguments))
            target = self.builder.inttoptr(function.ir, kind.as_pointer())
        else:
            target = function
        return Value(self, self.builder.call(target, [a.ir for a in arguments]))

    # Arithmetic beyond the operators ------------------------------------------------------------------------------------

    def _external(self, name: str, kind: ir.FunctionType) -> ir.Function:
        found = self.module.globals.get(name)
        return found if found is not None else ir.Function(self.module, kind, name)

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[Value]) -> Value:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return Value(self, self.builder.call(self._external(name, kind), [a.ir for a in arguments]))

    def _mangled(self, name: str, arguments: Sequence[Value]) -> Value:
        type = arguments[0].type
        letter = {F32: "f32", F16: "f16", I32: "i32", I16: "i16", I8: "i8"}[element_of(type)]
        lanes = f"v{lanes_of(type)}" if isinstance(type, ir.VectorType) else ""
        return self.intrinsic(f"llvm.{name}.{lanes}{letter}", type, arguments)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once where the processor can (without, it would take a call of the C library each)."""
        return self._mangled("fmuladd", [a, b, c])

    def sqrt(self, a: Value) -> Value:
        return self._mangled("sqrt", [a])

    def abs(self, a: Value) -> Value:
        return self._mangled("fabs", [a])

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger float; NaN where one is NaN."""
        return self._mangled("maximum", [a, b])

    # Threads ----------------------------------------------------------------------------------------------------------

    def _counter(self, address: Value) -> ir.Value:
        return self.builder.inttoptr(address.ir, I64.as_pointer())

    def atomic_add(self, address: Value, amount: Any) -> Value:
        """Add to an int64 and return what was there."""
        given = amount.ir if isinstance(amount, Value) else ir.Constant(I64, amount)
        return Value(self, self.builder.atomic_rmw("add", self._counter(address), given, "seq_cst"))

    def atomic_load(self, address: Value) -> Value:
        return Value(self, self.builder.load_atomic(self._counter(address), "seq_cst", 8))

    def atomic_store(self, value: int, address: Value) -> None:
        self.builder.store_atomic(ir.Constant(I64, value), self._counter(address), "seq_cst", 8)
