"""Solvers of dx/dt = velocity(t, x): fixed steps along a grid, or adaptive Dormand-Prince."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Evaluations of the velocity per step of the grid. None: dopri5 chooses its own steps (6
# evaluations each, rejected ones too, and 2 to begin with).
SOLVERS: dict[str, int | None] = {
    "euler": 1,
    "midpoint": 2,
    "heun": 2,
    "rk4": 4,
    "ab2": 1,
    "dopri5": None,
}

MAX_NFE = 10_000  # of dopri5

State = list[Tensor]


def solve(
    velocity: Callable,
    x: Tensor | Sequence[Tensor],
    grid: Tensor | Sequence[float],
    solver: str = "midpoint",
    *,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    callback: Callable | None = None,
    euler_step: Callable | None = None,
    project: Callable | None = None,
) -> tuple[Tensor | list[Tensor], int]:
    """Integrate dx/dt = velocity(t, x) from grid[0] to grid[-1].

    euler     order 1, 1 evaluation a step
    midpoint  order 2, 2
    heun      order 2, 2   explicit trapezoid, evaluates at points of the grid only
    rk4       order 4, 4   classic Runge-Kutta
    ab2       order 2, 1   two-step Adams-Bashforth for variable steps; starts with an Euler step,
                           whose error enters only once, so the order is kept
    dopri5    order 5, adaptive; takes only the ends of the grid

    Args:
        velocity: (t, x) -> dx/dt, t a Python float, x and the result of the structure and shapes of
            `x` below. Must not write to its argument; may return the same buffer every time.
        x: state at grid[0], a floating tensor, or a list or tuple of them (images of any sizes).
        grid: at least two strictly increasing times.
        solver: a key of `SOLVERS`.
        rtol, atol: dopri5 only. A step is accepted where the mean square of
            error / (atol + rtol max(|x|, |x_new|)) over all elements of all tensors is at most 1.
            That number is read back to the host.
        callback: called as callback(i, t, x) after step i = 0, 1, ..., with the state x at time t.
            What it returns, unless None, is the state from there on, of the same shapes, and the
            velocity may be another one: no slope of before is used.
        euler_step: "euler" only: computes (t, dt, x) -> x + dt * velocity(t, x) in place of a call
            of the velocity; x and the result have the dtype of the state, float32 or float64.
        project: computes (t, x) -> x after every step, before the callback, to hold x where it has
            to be.

    Returns:
        State at grid[-1], a tensor or a list, in the dtype of x, and the number of velocity calls.
        In between the state is float32 (float64 if x is), whatever the dtypes of x and of velocity.

    Raises:
        ValueError: unknown solver, bad grid or tolerance, empty x, velocity not shaped like x.
        TypeError: x is not made of floating tensors.
        RuntimeError: dopri5 starts from values that are not finite, its step vanishes, or it needs
            more than MAX_NFE evaluations.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, chapters II.1, II.4,
    II.5 and III.5.
    """
    times = check_solver(solver, grid, rtol, atol)
    if euler_step is not None and solver != "euler":
        raise ValueError(f"euler_step is for solver 'euler', got {solver!r}")
    system = _System(velocity, x, callback, euler_step, project)
    state = system.start(x)
    if solver == "dopri5":
        state = _dopri5(system, state, times[0], times[-1], rtol, atol)
    elif solver == "ab2":
        state = _ab2(system, state, times)
    else:
        euler = _euler if euler_step is None else _System.euler
        step = {"euler": euler, "midpoint": _midpoint, "heun": _heun, "rk4": _rk4}[solver]
        for t, end in zip(times[:-1], times[1:], strict=True):
            state, _ = system.accept(end, step(system, state, t, end))
    return system.external(state), system.nfe


def check_solver(
    solver: str, grid: Tensor | Sequence[float], rtol: float, atol: float
) -> list[float]:
    """The times of the grid, where these are arguments for `solve`."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and positive, got {value}")
    return _check_grid(grid)


class _System:
    """The velocity on lists of tensors in the dtype of the state; counts calls and steps."""

    def __init__(
        self,
        velocity: Callable,
        x: Tensor | Sequence[Tensor],
        callback: Callable | None,
        euler_step: Callable | None,
        project: Callable | None,
    ):
        self._velocity, self._callback, self._euler_step = velocity, callback, euler_step
        self._project = project
        self._single = isinstance(x, Tensor)
        tensors = [x] if self._single else list(x)
        if not tensors:
            raise ValueError("x must hold at least one tensor, got none")
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"x must be a floating tensor or a list of them, got {got}")
        self._dtypes = [tensor.dtype for tensor in tensors]
        self._shapes = [tensor.shape for tensor in tensors]
        self.nfe = self._steps = 0

    def start(self, x: Tensor | Sequence[Tensor]) -> State:
        tensors = [x] if self._single else x
        return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]

    def external(self, state: State) -> Tensor | list[Tensor]:
        """The state as the caller gave it: one tensor or a list, in the caller's dtype."""
        out = [x.to(dtype) for x, dtype in zip(state, self._dtypes, strict=True)]
        return out[0] if self._single else out

    def __call__(self, t: float, state: State) -> State:
        return self._checked(self._velocity(t, self.external(state)), state)

    def euler(self, state: State, t: float, end: float) -> State:
        """One call of euler_step."""
        x = state[0] if self._single else list(state)
        return self._checked(self._euler_step(t, end - t, x), state)

    def _checked(self, v: Tensor | Sequence[Tensor], state: State) -> State:
        self.nfe += 1
        v = [v] if isinstance(v, Tensor) else list(v)
        shapes = [k.shape for k in v]
        if shapes != self._shapes:  # they would broadcast
            expected, got = ([tuple(s) for s in shape] for shape in (self._shapes, shapes))
            raise ValueError(f"velocity must return shapes {expected}, got {got}")
        # A copy: a CUDA graph returns the same buffer every time, and several solvers look back.
        return [k.to(x.dtype, copy=True) for k, x in zip(v, state, strict=True)]

    def accept(self, t: float, state: State) -> tuple[State, bool]:
        """The state after a step, and whether the callback replaced it."""
        step, self._steps = self._steps, self._steps + 1
        if self._project is not None:
            state = self._like(state, self._project(t, self.external(state)), "project")
        if self._callback is None:
            return state, False
        returned = self._callback(step, t, self.external(state))
        if returned is None:
            return state, False
        return self._like(state, returned, "callback"), True

    def _like(self, state: State, x: Tensor | Sequence[Tensor], name: str) -> State:
        tensors = [x] if isinstance(x, Tensor) else list(x)
        shapes = [z.shape for z in tensors]
        if shapes != self._shapes:
            expected, got = ([tuple(s) for s in z] for z in (self._shapes, shapes))
            raise ValueError(f"{name} must return shapes {expected}, got {got}")
        return [z.to(old) for z, old in zip(tensors, state, strict=True)]


def _add(state: State, *terms: tuple[float, State]) -> State:
    """state + sum of c * k over the pairs (c, k)."""
    (c, first), *rest = terms
    out = [torch.add(x, k, alpha=c) for x, k in zip(state, first, strict=True)]
    for c, ks in rest:
        for x, k in zip(out, ks, strict=True):
            x.add_(k, alpha=c)
    return out


def _euler(f: _System, x: State, t: float, end: float) -> State:
    return _add(x, (end - t, f(t, x)))


def _midpoint(f: _System, x: State, t: float, end: float) -> State:
    h = end - t
    return _add(x, (h, f(t + h / 2, _add(x, (h / 2, f(t, x))))))


def _heun(f: _System, x: State, t: float, end: float) -> State:
    h = end - t
    k1 = f(t, x)
    k2 = f(end, _add(x, (h, k1)))
    return _add(x, (h / 2, k1), (h / 2, k2))


def _rk4(f: _System, x: State, t: float, end: float) -> State:
    h = end - t
    k1 = f(t, x)
    k2 = f(t + h / 2, _add(x, (h / 2, k1)))
    k3 = f(t + h / 2, _add(x, (h / 2, k2)))
    k4 = f(end, _add(x, (h, k3)))
    return _add(x, (h / 6, k1), (h / 3, k2), (h / 3, k3), (h / 6, k4))


def _ab2(f: _System, x: State, times: list[float]) -> State:
    """x_new = x + h ((1 + r/2) v - (r/2) v_before), r = h / h_before: exact for v linear in t."""
    before = h_before = None
    for t, end in zip(times[:-1], times[1:], strict=True):
        h = end - t
        v = f(t, x)
        if before is None:
            x = _add(x, (h, v))
        else:
            half = h / h_before / 2
            x = _add(x, (h * (1 + half), v), (-h * half, before))
        x, replaced = f.accept(end, x)
        before, h_before = (None, None) if replaced else (v, h)
    return x


# Dormand-Prince 5(4): nodes, rows of the stages, weights of order 5 minus those of order 4. The
# last row is the solution, so its stage serves as the first one of the next step.
_NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_ROWS = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _dopri5(f: _System, x: State, t: float, end: float, rtol: float, atol: float) -> State:
    """Local extrapolation, elementary step control with safety 0.9 and factors within [0.2, 10]."""
    first = f(t, x)
    h = _initial_step(f, x, first, t, end, rtol, atol)
    grow = 10.0
    while t < end:
        last = t + 1.01 * h >= end  # no sliver at the end
        if last:
            h = end - t
        if not h > 16 * math.ulp(max(abs(t), abs(end))):
            raise RuntimeError(
                f"dopri5: the step vanished at t = {t:.6g} after {f.nfe} evaluations"
            )
        if f.nfe + 6 > MAX_NFE:
            raise RuntimeError(
                f"dopri5: reached t = {t:.6g} only after {f.nfe} evaluations, MAX_NFE"
            )
        t_new = end if last else t + h
        k = [first]
        for node, row in zip(_NODES[1:], _ROWS[1:], strict=True):
            stage = _add(x, *((h * a, ki) for a, ki in zip(row, k, strict=True) if a))
            k.append(f(t_new if node == 1 else t + node * h, stage))
        error = _add(
            [torch.zeros_like(y) for y in x],
            *((h * e, ki) for e, ki in zip(_ERROR, k, strict=True) if e),
        )
        size = _rms(error, x, stage, rtol, atol)
        if size <= 1:
            t, first = t_new, k[-1]
            x, replaced = f.accept(t, stage)
            if (replaced or x is not stage) and t < end:
                first = f(t, x)
            h *= min(grow, 0.9 * size**-0.2) if size > 0 else grow
            grow = 10.0
        else:  # NaN too
            h *= max(0.2, 0.9 * size**-0.2) if math.isfinite(size) else 0.2
            grow = 1.0  # do not grow right after a rejection
    return x


def _initial_step(f: _System, x: State, v: State, t: float, end: float, rtol, atol) -> float:
    """Hairer's guess: a step whose error is about a hundredth of the tolerance. One evaluation."""
    size, speed = (_rms(y, x, x, rtol, atol) for y in (x, v))
    if not math.isfinite(size + speed):
        raise RuntimeError(f"dopri5: the state or the velocity at t = {t:.6g} is not finite")
    h = 0.01 * size / speed if min(size, speed) > 1e-5 else 1e-6
    h = min(h, end - t)
    change = _add(f(t + h, _add(x, (h, v))), (-1.0, v))
    steepest = max(speed, _rms(change, x, x, rtol, atol) / h)
    guess = (0.01 / steepest) ** 0.2 if steepest > 1e-15 else max(1e-6, h * 1e-3)
    return min(100 * h, guess, end - t) if math.isfinite(guess) and guess > 0 else h


def _rms(y: State, x: State, x_new: State, rtol: float, atol: float) -> float:
    """Root mean square of y / (atol + rtol max(|x|, |x_new|)). Reads one number from the device."""
    total = torch.zeros((), device=y[0].device)
    for a, b, c in zip(y, x, x_new, strict=True):
        total = total + (a / (atol + rtol * torch.maximum(b.abs(), c.abs()))).square().sum()
    return math.sqrt(total.item() / max(1, sum(a.numel() for a in y)))


def _check_grid(grid: Tensor | Sequence[float]) -> list[float]:
    times = [float(t) for t in (grid.tolist() if isinstance(grid, Tensor) else grid)]
    if len(times) < 2 or not all(math.isfinite(t) for t in times):
        raise ValueError(f"grid must hold at least two finite times, got {times}")
    for a, b in zip(times[:-1], times[1:], strict=True):
        if b <= a:
            raise ValueError(f"grid must be strictly increasing, got {a} before {b}")
    return times
