"""What is there without the laboratory, and without a clone of the repository."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from opticam.lab.datasets import demo
from opticam.lab.files import PACKAGE, REPOSITORY

BLOCKED = """
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in "{names}".split() else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
LABORATORY = (
    "pandas pyarrow papermill nbformat nbclient foolbox timm matplotlib seaborn tqdm IPython ipywidgets tabulate"
)
LABORATORY += " captum distributed dask yaml psutil transformers huggingface_hub safetensors"
OWN_NETWORK = """
import opticam
import torch
from torch import nn
from opticam import METHODS, metrics, grad_cam, opti_cam, wrap

torch.manual_seed(0)
body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
network = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
model = wrap(network, "0", input_size=32, class_names=["a", "b", "c", "d"])
images, class_idx = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
S = opti_cam(model, images, class_idx, num_steps=3).saliency
for name in ("grad_cam", "layer_cam", "score_cam", "ablation_cam", "equal_weights"):
    assert METHODS[name](model, images, class_idx).shape == S.shape == (2, 1, 32, 32)
with torch.no_grad():
    p, o = (metrics.class_probability(network(x), class_idx) for x in (images, images * S))
for name in ("average_drop", "average_gain", "average_increase"):
    assert metrics.METRICS[name](p, o).shape == (2,)
boxes = [torch.tensor([[2.0, 2.0, 20.0, 30.0]])] * 2
assert metrics.energy_pointing_game(S, boxes).shape == metrics.pointing_game(S, boxes).shape == (2,)
assert metrics.localization_error(S, boxes).shape == metrics.soft_f1(S, boxes).shape == (2,)
assert metrics.road(model, images, class_idx, S).shape == (2,)
assert metrics.insertion(model, images, class_idx, S)[0].shape == (2,)
assert opticam.load_model("torchvision/resnet18", pretrained=False, num_classes=2).layer
"""


def run(program, folder, *words):
    """A program in a process of its own that sees no file of this repository but those in `folder`."""
    begin = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPTICAM"))}
    command = [sys.executable, "-I", "-W", "ignore", "-c", begin + program, *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package alone, as `pip install .` leaves it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, folder / "opticam", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def from_wheel(tmp_path_factory):
    """A folder into which pip has installed a wheel, built without the network; its packages are those of the tests."""
    pytest.importorskip("hatchling", reason="the wheel is built without the network by hatchling, of the extra test")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, REPOSITORY], check=True
    )
    (wheel,) = folder.glob("opticam-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.mark.slow
def test_a_wheel_holds_the_files_of_the_package(from_wheel):
    (wheel,) = from_wheel.parent.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "opticam"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert packed == {name for name in listed.stdout.splitlines() if (REPOSITORY / name).exists()}


@pytest.mark.slow
def test_ones_own_network_is_explained_and_scored_without_the_laboratory(from_wheel):
    done = run(BLOCKED.format(names=LABORATORY) + OWN_NETWORK, from_wheel)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_core_imports_nothing_slow_beside_torch_and_torchvision(installed):
    program = """
import opticam, torch, torchvision
before = set(sys.modules)
from opticam import load_model, opti_cam, grad_cam, wrap, METRICS
print(*{name.partition(".")[0] for name in sys.modules.keys() - before})
"""
    done = run(program, installed)
    assert "opticam" in done.stdout.split(), done.stderr
    assert not {*done.stdout.split()} & {*LABORATORY.split(), "scipy", "skimage", "cv2"}


def test_the_command_says_in_one_sentence_that_the_laboratory_is_missing(installed):
    done = run(BLOCKED.format(names=LABORATORY) + "from opticam.cli import main\nsys.exit(main())", installed, "--help")
    assert done.returncode == 2
    assert done.stderr == (
        "opticam: the command needs the extra lab: pip install '.[lab]' in a clone; "
        "run, render, verify and batch need a clone of the repository too (No module named 'tqdm')\n"
    )


COMMAND = (
    "import opticam\nfrom opticam.cli import main\nassert opticam.__file__.startswith(sys.path[0])\nsys.exit(main())"
)


@pytest.mark.slow
def test_a_photo_is_explained_without_a_clone(from_wheel):
    photo = str(demo().paths[17])
    done = run(COMMAND, from_wheel, "explain", photo, "--method", "grad_cam", "--output", "deep/eagle.png")
    assert done.returncode == 0, done.stderr
    assert "bald eagle" in done.stdout
    assert (from_wheel / "deep" / "eagle.png").stat().st_size > 10_000
    done = run("from opticam.lab.datasets import demo\nprint(sum(len(sample.boxes) for sample in demo()))", from_wheel)
    assert int(done.stdout) == sum(len(photo.boxes) for photo in demo().records)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["run", "run --list", "run 03 -p limit=2", "render", "render 03", "verify", "batch demo"]
)
def test_what_needs_the_repository_says_so_in_one_sentence(installed, words):
    done = run(COMMAND, installed, *words.split())
    assert done.returncode == 2
    assert done.stderr.startswith("opticam: notebooks: none in ")
    assert done.stderr.endswith("; wanted a clone of the repository, set up with make\n")
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
