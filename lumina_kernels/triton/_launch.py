"""Launches of kernels that cost the host a third of Triton's own.

`kernel[grid](...)` binds the arguments by name, reads settings and writes all options into a string
to find what it has compiled. Here that is a dictionary, whose key has what Triton compiles a kernel
anew for: the device, the constants, and of each argument its type, whether 16 divides it and
whether it is 1. What is not in it, and every launch that a profiler watches, goes Triton's way.
"""

from functools import cache

from triton import knobs
from triton._C.libtriton import native_specialize_impl
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import JITFunction, driver

# The chains of a profiler's hooks; they are empty where there is none.
_HOOKS = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook

# Key -> compiled kernel, its constants, and the options, whose number in the key is theirs as long
# as they live.
_compiled: dict[tuple, tuple] = {}


def launch(kernel, programs: int, arguments: tuple, options: dict, **constants) -> None:
    """kernel[(programs,)](*arguments, **constants, **options).

    `arguments` are those that are no constants, which in a kernel come before these. `options`:
    constants and launch options, a dictionary that its caller keeps and does not change.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[(programs,)](*arguments, **constants, **options)
        return
    active = driver.active
    device = active.get_current_device()
    types = native_specialize_impl(_compiler_of(device), arguments, False, True, True)
    key = (id(kernel), device, id(options), types, *constants.values())
    found = _compiled.get(key)
    runtime = knobs.runtime
    watched = _is_watched(runtime.launch_enter_hook, runtime.launch_exit_hook)
    if found is None or watched:
        compiled = kernel[(programs,)](*arguments, **constants, **options)
        if not watched and isinstance(compiled, CompiledKernel):
            known = constants | options
            rest = [known[name] for name in kernel.arg_names[len(arguments) :]]
            handles = compiled.function, compiled.packed_metadata, None, None, None
            _compiled[key] = compiled.run, handles, rest, options, kernel, compiled
        return
    run, handles, rest, *_ = found
    run(programs, 1, 1, active.get_current_stream(device), *handles, *arguments, *rest)


@cache
def _compiler_of(device: int):
    """What says of a tensor's address what Triton looks at."""
    return make_backend(driver.active.get_current_target())


def _is_watched(*hooks) -> bool:
    """Whether a profiler asked to be told of launches."""
    return hooks != _HOOKS or any([hook.calls for hook in hooks])
