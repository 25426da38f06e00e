"""What a call of a pipeline asks for, and the rules that it is held to before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

import torch
from torch import Tensor

from lumina.models.parts.rope import RopeScaling
from lumina.pipelines.text import Text
from lumina.sampling.context_drop import ContextDrop
from lumina.sampling.guidance import Guidance

OUTPUTS = ("pil", "np", "pt", "latent")
Size = tuple[int, int]  # (height, width)
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Options:
    """What our pipelines take beyond the parameters of diffusers', by keyword.

    Args:
        solver: "euler" (diffusers' only one), "midpoint", "heun", "rk4", "ab2", "dopri5".
        schedule: time grid instead of the scheduler's: "uniform", "rational:SHIFT", "sigmoid", or
            a function from steps to a grid, as for `lumina.sample`.
        guidance: `lumina.Guidance` instead of what guidance_scale and its like say.
        rope_scaling: `lumina.RopeScaling`, for sizes beyond those of training.
        base_seqlen: tokens of a picture at training, for proportional attention.
        context_drop: `lumina.ContextDrop`.
        image: start from these pictures (PIL, NumPy or PyTorch; one, or one for each prompt).
        strength: share of the way from noise that is run anew, the start is noised to it exactly;
            None: 0.6, with a mask 1.
        mask_image: redraw `image` where this is white (as `image`), and keep it elsewhere.
        regions: of Lumina-Next: what parts of the picture show, pairs of a box (left, top, right,
            bottom), in shares of the width and height, and a prompt; a box of None is the rest.
            The one prompt of the call then conditions the whole by its mean, also where it is
            guided away from; no part sees its words.
        rtol, atol: of dopri5.
    """

    solver: str = "euler"
    schedule: str | Callable[[int], Tensor] | None = None
    guidance: Guidance | None = None
    rope_scaling: RopeScaling | None = None
    base_seqlen: int | None = None
    context_drop: ContextDrop | None = None
    image: object = None
    strength: float | None = None
    mask_image: object = None
    regions: Sequence[tuple[Box | None, str]] = ()
    rtol: float = 1e-3
    atol: float = 1e-3

    def __post_init__(self) -> None:
        if self.guidance is not None and not isinstance(self.guidance, Guidance):
            got = type(self.guidance).__name__
            raise TypeError(f"guidance must be a lumina.Guidance, got {got}; guidance_scale is one")
        for name, kind in (("rope_scaling", RopeScaling), ("context_drop", ContextDrop)):
            given = getattr(self, name)
            if given is not None and not isinstance(given, kind):
                got = type(given).__name__
                raise TypeError(f"{name} must be a lumina.{kind.__name__}, got {got}")
        if not isinstance(self.solver, str):
            raise TypeError(f"solver must be a str, got {type(self.solver).__name__}")
        if not (self.schedule is None or isinstance(self.schedule, str) or callable(self.schedule)):
            got = type(self.schedule).__name__
            raise TypeError(f"schedule must be a str or a function, got {got}")
        if (tokens := self.base_seqlen) is not None and not (is_count(tokens) and tokens >= 2):
            raise ValueError(f"base_seqlen must be a whole number from 2 on, got {tokens!r}")
        for name in ("rtol", "atol"):
            check_number(name, getattr(self, name))
        if self.image is None and not (self.mask_image is None and self.strength is None):
            raise ValueError("strength and mask_image need an image to start from")
        if not isinstance(self.regions, (list, tuple)) or not all(map(_is_region, self.regions)):
            raise TypeError(
                "regions must be pairs of a box (left, top, right, bottom) or None, and a prompt, "
                f"got {self.regions!r}"
            )
        if self.strength is not None and not 0 < check_number("strength", self.strength) <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {self.strength}")

    @classmethod
    def of(cls, pipeline: type, given: Mapping) -> Options:
        """Those that a call of a pipeline got by keyword."""
        if unknown := given.keys() - {field.name for field in fields(cls)}:
            names = ", ".join(map(repr, sorted(unknown)))
            raise TypeError(f"{pipeline.__name__}() got an unexpected keyword argument {names}")
        return cls(**given)

    @property
    def start(self) -> float:
        """The strength that holds."""
        if self.strength is not None:
            return self.strength
        return 0.6 if self.image is not None and self.mask_image is None else 1.0


@dataclass
class Call:
    """The parameters that the pipelines of all families share, checked. Names as in diffusers.

    Raises:
        TypeError, ValueError: the rule that is broken, and what came.
    """

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    text: Text | None = None  # prompt_embeds and their mask
    negative_text: Text | None = None
    height: int | Sequence[int] | None = None
    width: int | Sequence[int] | None = None
    num_inference_steps: int = 30
    sigmas: Sequence[float] | None = None
    num_images_per_prompt: int = 1
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    latents: Tensor | list[Tensor] | None = None
    output_type: str = "pil"
    return_dict: bool = True
    max_sequence_length: int = 256
    callback_on_step_end: Callable | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.text is None):
            got = "neither" if self.prompt is None else "both"
            raise ValueError(f"give either prompt or prompt_embeds, got {got}")
        if self.negative_prompt is not None and self.negative_text is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds, got both")
        self.prompt = prompts_of("prompt", self.prompt)
        negative = prompts_of("negative_prompt", self.negative_prompt)
        if isinstance(self.negative_prompt, str):
            negative = negative * self.batch
        for name, given in (("negative_prompt", negative), ("embeddings", self.negative_text)):
            if given is not None and len(given) != self.batch:
                raise ValueError(
                    f"there must be one negative prompt for each of the {self.batch} prompts, "
                    f"got {len(given)} as {name}"
                )
        self.negative_prompt = negative
        for name in ("num_inference_steps", "num_images_per_prompt", "max_sequence_length"):
            if not is_count(getattr(self, name)):
                got = getattr(self, name)
                raise ValueError(f"{name} must be a whole number above 0, got {got!r}")
        if self.sigmas is not None:
            self.sigmas = [check_scale("each of sigmas", s) for s in _listed("sigmas", self.sigmas)]
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            got = type(self.callback_on_step_end).__name__
            raise TypeError(f"callback_on_step_end must be a function, got {got}")
        if self.output_type not in OUTPUTS:
            got = self.output_type
            raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, got {got!r}")
        if not isinstance(self.generator, torch.Generator | None):
            several = isinstance(self.generator, (list, tuple))
            if not several or not all(isinstance(g, torch.Generator) for g in self.generator):
                got = type(self.generator).__name__
                raise TypeError(
                    f"generator must be a torch.Generator or a list of them, got {got}"
                    + (" with others" if several else "")
                )
            if len(self.generator) != self.pictures:
                raise ValueError(
                    f"there must be one generator, or {self.pictures}, one for each picture, "
                    f"got {len(self.generator)}"
                )

    @property
    def batch(self) -> int:
        return len(self.prompt if self.prompt is not None else self.text)

    @property
    def pictures(self) -> int:
        return self.batch * self.num_images_per_prompt

    def sizes(self, default: int, multiple: int) -> tuple[list[Size], bool]:
        """(height, width) in pixels of each picture, and whether they came as a list."""
        lists = [s for s in (self.height, self.width) if isinstance(s, (list, tuple))]
        for each in lists:
            if len(each) != self.batch:
                raise ValueError(
                    f"height and width must be one number, or one for each of the {self.batch} "
                    f"prompts, got {len(each)}"
                )
        sides = []
        for name, given in (("height", self.height), ("width", self.width)):
            given = given if isinstance(given, (list, tuple)) else [given] * self.batch
            given = [default if side is None else side for side in given]
            for side in given:
                if not is_count(side) or side % multiple:
                    raise ValueError(
                        f"{name} must be a whole multiple of {multiple} pixels, got {side}"
                    )
            sides.append(map(int, given))
        sizes = [
            size for size in zip(*sides, strict=True) for _ in range(self.num_images_per_prompt)
        ]
        return sizes, bool(lists)

    def check_callback(self, known: Sequence[str]) -> None:
        """Raise for a tensor that the callback of this pipeline can not ask for."""
        for name in self.callback_on_step_end_tensor_inputs:
            if name not in known:
                raise ValueError(
                    "callback_on_step_end_tensor_inputs must be among "
                    f"{', '.join(known)}, got {name!r}"
                )


def prompts_of(name: str, prompt) -> list[str] | None:
    """A prompt, or several, as a list of their own."""
    if prompt is None:
        return None
    several = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(several, (list, tuple)) or any(not isinstance(p, str) for p in several):
        got = type(several).__name__
        if isinstance(several, (list, tuple)):
            got += f" with {next(type(p).__name__ for p in several if not isinstance(p, str))}"
        raise TypeError(f"{name} must be a str or a list of them, got {got}")
    if not several:
        raise ValueError(f"{name} must hold at least one prompt, got an empty list")
    return list(several)


def _listed(name: str, values) -> list:
    """Numbers in a list, an array or a tensor, as a list."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of numbers, got {type(values).__name__}")
    return list(values)


def is_count(value) -> bool:
    """Whether it is a whole number above 0; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def _is_region(region) -> bool:
    if not isinstance(region, (tuple, list)) or len(region) != 2:
        return False
    box, prompt = region
    if box is not None:
        if not isinstance(box, (tuple, list)) or len(box) != 4:
            return False
        if not all(isinstance(side, Real) for side in box):
            return False
    return isinstance(prompt, str)


def check_number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_scale(name: str, value) -> float:
    """A number that is finite."""
    if not math.isfinite(check_number(name, value)):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def lora_scale(name: str, given: Mapping | None) -> float | None:
    """The weight of adapters in the keyword arguments of attention, which may hold nothing else."""
    if not given:
        return None
    if given.keys() != {"scale"}:
        raise ValueError(f"{name} takes a scale alone, got {', '.join(given)}")
    return check_scale(f"scale of {name}", given["scale"])
