"""Triton's interpreter without what it does in vain: the same kernels in a quarter of the time."""

from functools import cache

from triton.language import core, semantic
from triton.runtime import interpreter


def hasten():
    _without_overflow()
    _with_one_preparation()
    _with_known_types()
    _with_known_shapes()


def _without_overflow():
    """It looks for overflow of every sum and product of integers and, as `debug` is off, drops what
    it finds."""
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


def _with_one_preparation():
    """It prepares triton.language for a kernel, and then again for every call of another function
    in it: skip the second."""
    prepared = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in prepared:  # the others have the kernel's
            interpreter._patch_lang(self.fn)
            prepared.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _with_known_types():
    """It makes the type and the shape of every value anew: a kernel has few of them."""
    types, shapes = {}, {}
    numpy_dtype = cache(interpreter._get_np_dtype)
    pointers = interpreter._get_np_dtype(core.pointer_type(core.int8))

    def block_type(self, element_ty, shape, init=core.block_type.__init__):
        key = element_ty.name, *map(core._unwrap_if_constexpr, shape)
        if key not in types:
            init(self, element_ty, shape)
            types[key] = vars(self).copy()
        vars(self).update(types[key], element_ty=element_ty)

    def tensor(self, handle, type, init=core.tensor.__init__):
        key = type.name if type.is_block() else None
        if key not in shapes:
            init(self, handle, type)
            shapes[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = lambda dtype: (
        pointers if dtype.scalar.is_ptr() else numpy_dtype(dtype.scalar)
    )


def _with_known_shapes():
    """It goes through the shapes of two operands side by side, also where they are the same."""

    def broadcast(self, lhs, rhs, both=semantic.TritonSemantic.broadcast_impl_value):
        blocks = lhs.type.is_block(), rhs.type.is_block()
        alike = blocks[0] == blocks[1] and lhs.handle.data.shape == rhs.handle.data.shape
        return (lhs, rhs) if alike else both(self, lhs, rhs)

    semantic.TritonSemantic.broadcast_impl_value = broadcast
