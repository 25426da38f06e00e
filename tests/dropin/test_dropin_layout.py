"""The pass is small, knows no model, and costs nobody an import who does not use it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "lumina_kernels" / "dropin").glob("*.py"))
MODELS = re.compile(
    r"flux|lumina.?(next|image|2)|next.?dit|\bwan\b|qwen|\bsd3|pixart|hidream|z.?image|sana|cogv"
    r"|hunyuan|mochi|chroma|\bltx|\blatte\b|allegro|aura.?flow|omnigen|kandinsky|cosmos|bria|\bovis"
    r"|longcat|ideogram|\bprx|skyreels|helios|easyanimate|consisid|chronoedit|stable.?audio",
    re.IGNORECASE,
)

PROGRAM = """
import sys, torch
before = set(sys.modules)
import lumina_kernels
heavy = "torch._dynamo", "torch._inductor", "torch._functorch", "sympy", "mpmath", "triton"
heavy += "torch.fx.experimental", "lumina_kernels.dropin"
new = [m for m in sys.modules if m not in before]
print(len(new), [m for m in new if any(m == h or m.startswith(h + ".") for h in heavy)])
"""


def test_the_pass_stays_small():
    lines = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert len(lines) >= 5
    assert sum(lines.values()) <= 1000, lines


def test_the_pass_names_no_model():
    named = [
        f"{path.name}:{number}: {line}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MODELS.search(line)
    ]
    assert named == []
    assert MODELS.search("class FluxBlock") and not MODELS.search("wants lumina_kernels, flatten")


def test_importing_the_package_imports_no_compiler():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT)
    count, _, heavy = done.stdout.partition(" ")
    assert heavy == "[]\n" and int(count) > 20, done.stdout + done.stderr
