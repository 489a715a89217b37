import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opticam import METHODS, SCHEDULES
from opticam.lab.identity import describe
from opticam.methods.ascent import map_space, weight_space


def scaled(factor):
    return lambda model, images, class_idx: torch.full_like(images[:, :1], factor)


def in_a_set(model, images, class_idx, kind="a"):
    return images if kind in {"a", "b", "c", "d"} else None


class Own(nn.Module):
    def __init__(self, strength):
        super().__init__()
        self.strength = strength


def dense(seed):
    torch.manual_seed(seed)
    return nn.Linear(2, 2)


FAST = partial(METHODS["opti_cam"], **SCHEDULES["fast"])
DIFFERENT = {
    "options": [METHODS["opti_cam"], FAST, partial(FAST, num_steps=17)],
    "function": [METHODS["grad_cam"], METHODS["layer_cam"], lambda *_: 1, lambda *_: 2],
    "attribute": [lambda x: x.relu(), lambda x: x.abs()],
    "default": [lambda x, a=1: a, lambda x, a=2: a, lambda x, *, a=1: a, lambda x, *, a=2: a],
    "closure": [scaled(0.5), scaled(0.25)],
    "positional": [in_a_set, partial(in_a_set, 1), partial(in_a_set, 2)],
    "array": [np.zeros(3), np.ones(3), np.array(["a", None]), np.array(["b", None])],
    "tensor": [torch.zeros(2000), torch.zeros(2000).double(), torch.zeros(2000).index_fill(0, torch.tensor([999]), 1)],
    "library": [torch.sigmoid, F.relu, torch.Tensor.sigmoid],
    "network": [dense(0), dense(1), Own(1), Own(2)],
    "package's lambda": [weight_space, weight_space._replace(sums=map_space.sums)],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_methods_that_differ_are_described_differently(tiny, kind):
    methods = [partial(METHODS["opti_cam"], some=method) for method in DIFFERENT[kind]]
    described = [json.dumps(describe(method, tiny)) for method in methods]
    assert len(set(described)) == len(methods)
    assert described == [json.dumps(describe(method, tiny)) for method in methods]


def test_layers_are_described_by_name(tiny):
    layers = [partial(METHODS["grad_cam"], layer=layer) for layer in (tiny.features[0], tiny.features[2])]
    assert [describe(method, tiny)[-1] for method in layers] == [{"layer": "features.0"}, {"layer": "features.2"}]


PROGRAM = """
from functools import cache, partial
import numpy as np
import torch
from torch import nn
from opticam import METHODS, SCHEDULES
from opticam.lab.identity import describe
from test_identity import in_a_set
SIZE = {size}
def direct(model, images, class_idx):
    return SIZE
def in_a_list(model, images, class_idx):
    return [image * SIZE for image in images]
@torch.no_grad()
def decorated(model, images, class_idx):
    return SIZE
class Kept:
    @staticmethod
    def one():
        return {size}
def of_a_class(model, images, class_idx):
    return Kept.one()
@cache
def cached(model, images, class_idx):
    return SIZE
def even(n):
    return n == 0 or odd(n - SIZE)
def odd(n):
    return n != 0 and even(n - 1)
def unrelated(model, images, class_idx):
    return images.SIZE
def of_a_table(model, images, class_idx):
    return methods["direct"](model, images, class_idx)
methods = {{f.__name__: f for f in (direct, in_a_list, decorated, of_a_class, cached, even, of_a_table)}}
same = {{"fast": partial(METHODS["opti_cam"], **SCHEDULES["fast"]), "in_a_set": in_a_set, "unrelated": unrelated}}
same["objects"] = partial(in_a_set, kind=np.array(["a", None]))
for name, method in {{**methods, **same}}.items():
    print(name, describe(method, nn.Identity()))
"""


@pytest.mark.slow
def test_another_process_describes_alike_what_has_not_changed():
    told = []
    for seed, size in ("1", 3), ("2", 3), ("3", 4):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", PROGRAM.format(size=size)]
        told.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines())
    assert told[0] == told[1]
    changed = [line.split()[0] for line, other in zip(told[0], told[2], strict=True) if line != other]
    assert changed == ["direct", "in_a_list", "decorated", "of_a_class", "cached", "even", "of_a_table"]


def test_what_no_other_process_would_recognise_is_refused(tiny):
    with pytest.raises(ValueError, match=r"methods: wanted functions whose options are numbers.* of object"):
        describe(partial(METHODS["grad_cam"], layer=object()), tiny)
