"""What the `oscar` command imports before it codes: counted in modules, since seconds differ between machines."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from oscar.utils.extras import PACKAGES
# as where only the extra `torch` is installed: "not to be found"
sys.modules.update(dict.fromkeys(name for name, (_, extras) in PACKAGES.items() if "torch" not in extras))
from oscar.cli import lean
from oscar.cli.main import main
lean.is_own_process = True
image, file, back = sys.argv[1:]
LISTED = ("torch._dynamo", "scipy.stats")
for model in ("nano", "nano-vq"):
    assert main(["compress", image, file, "--model", model, "--engine", "torch", "--overwrite"]) == 0
    assert main(["decompress", file, back, "--engine", "torch", "--overwrite"]) == 0
found = [name for name, module in sys.modules.items() if module]
print(len(found), *(name for name in found if "." not in name or name in LISTED))
assert main(["info", file]) == main(["doctor"]) == 0
assert main(["train"]) == main(["evaluate"]) == 2
"""
# What takes longest to import, and serves neither encoder nor decoder.
HEAVY = {
    "bitsandbytes", "compressai", "matplotlib", "numba", "pandas", "peft", "pyarrow", "pyiqa", "scipy.stats",
    "tensorboard", "torch._dynamo", "torch_geometric", "torchvision", "transformers", "triton", "wandb",
}  # fmt: skip


@pytest.mark.slow
def test_coding_imports_what_it_uses(photos, tmp_path):
    """By both kinds of models, one after the other."""
    paths = [str(photos / "0.png"), str(tmp_path / "0.oscar"), str(tmp_path / "0.png")]
    done = subprocess.run([sys.executable, "-c", CODE, *paths], capture_output=True, text=True)
    lines = [
        f"{script}: hydra-core is not installed; allowed: pip install 'oscar-codec[{extra}]'"
        for script, extra in (("train", "train"), ("evaluate", "eval"))
    ]
    assert (done.returncode, done.stderr.splitlines()) == (0, lines)
    count, *names = done.stdout.splitlines()[4].split()
    assert not HEAVY & set(names)
    assert {"torch", "diffusers"} <= set(names)
    assert int(count) < 3500


@pytest.mark.slow
def test_what_was_left_out_can_be_imported_afterwards():
    program = """
import sys
from oscar.cli import lean
lean.is_own_process = True
with lean.imports():
    from oscar.inference.load import load
    assert "peft" not in sys.modules or sys.modules["peft"] is None
import compressai, peft, scipy.stats, torch, torch._dynamo
from oscar.models.compressai import AttentionBlock, EntropyBottleneck
assert compressai.layers.AttentionBlock is AttentionBlock
assert issubclass(EntropyBottleneck, compressai.entropy_models.EntropyBottleneck)
assert abs(scipy.stats.norm.ppf(0.975) - 1.96) < 0.01
assert peft.LoraConfig(r=2).r == 2 and compressai.zoo.models
function = lambda: 1
assert torch.compiler.disable(function) is not function
EntropyBottleneck(2).update()
assert EntropyBottleneck(2).entropy_coder.name == compressai.get_entropy_coder()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_other_programs_get_everything():
    """`main` called from Python hides nothing from the libraries that its caller uses too."""
    program = """
import sys
from oscar.cli import lean
with lean.imports():
    import diffusers.models.modeling_utils
from diffusers.utils import is_peft_available
assert is_peft_available() and "torch._dynamo" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
