import io
import time
from datetime import UTC, datetime
from functools import partial

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

pytest.importorskip("ipywidgets", reason="no ipywidgets; they come with the extra 'notebooks'")

from opticam import METHODS, SCHEDULES, opti_cam, wrap
from opticam.classifier import class_logit
from opticam.lab import explorer
from opticam.lab.datasets import demo, to_input
from opticam.lab.explorer import KEPT, Explanation, Explorer, Stopped, describe, explanation_of, read_upload
from opticam.lab.plotting import to_picture
from opticam.methods.opti_cam import opti_cam_map

mpl.use("agg")


@pytest.fixture
def model(tiny):
    return wrap(tiny, "features.3").train()


def state(model):
    flags = [module.training for module in model.modules()]
    flags += [parameter.requires_grad for parameter in model.parameters()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return flags, hooks, [parameter.grad for parameter in model.parameters()]


def test_following_opti_cam_does_not_change_it(model, images):
    before = state(model)
    found = explanation_of(model, images[1], 3, num_steps=7)
    result = opti_cam(model, images[1:2], torch.tensor([3]), num_steps=7)
    assert torch.equal(found.saliency, result.saliency[0])
    assert torch.equal(found.objective, result.objective[0])
    assert found.step == result.num_steps.item()
    assert list(found.maps) == list(range(8))
    assert torch.equal(found.maps[found.step], found.saliency)
    assert state(model) == before


def test_every_kept_map_has_the_logit_and_probability_told(model, images):
    found = explanation_of(model, images[0], 2, num_steps=5)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(found.logits, model(images[:1])[0], rtol=1e-12)
        for step, saliency in found.maps.items():
            masked_logits = model(images[:1] * saliency)[0].tolist()
            exponentials = [np.exp(logit) for logit in masked_logits]
            assert found.objective[step].item() == pytest.approx(masked_logits[2], rel=1e-10)
            assert found.masked_prob[step].item() == pytest.approx(exponentials[2] / sum(exponentials), rel=1e-10)
    assert found.masked_logits[2].item() == pytest.approx(found.objective.max().item(), rel=1e-10)


def test_of_many_steps_some_are_kept_the_first_and_the_best_among_them(model, images):
    found = explanation_of(model, images[0], 2, num_steps=120)
    assert len(found.objective) == 121
    assert len(found.maps) <= KEPT + 2
    assert {0, found.step} <= set(found.maps)
    assert list(found.maps) == sorted(found.maps)


@pytest.mark.parametrize("method", ["fake_cam", "grad_cam", "ablation_cam", "score_cam"])
def test_other_methods_have_one_map_and_no_steps(model, images, method):
    found = explanation_of(model, images[2], 1, method)
    assert torch.equal(found.saliency, METHODS[method](model, images[2:3], torch.tensor([1]))[0])
    assert (found.step, len(found.objective)) == (0, 1)
    assert list(found.maps) == [0]


@pytest.mark.parametrize("told", [{}, {"num_steps": 3}])
def test_a_schedule_takes_its_own_steps_or_those_told(model, images, told):
    found = explanation_of(model, images[1], 3, "opti_cam:fast", **told)
    options = SCHEDULES["fast"] | told
    assert torch.equal(found.saliency, opti_cam(model, images[1:2], torch.tensor([3]), **options).saliency[0])
    assert list(found.maps) == [0]
    with pytest.raises(ValueError, match=r"^num_steps: wanted at least 0, got -1$"):
        explanation_of(model, images[1], 3, num_steps=-1)


@pytest.mark.parametrize("method", ["opti_cam", "grad_cam", "ablation_cam", "score_cam", "extremal_perturbation"])
@pytest.mark.parametrize("asked", [1, 12])
def test_a_stop_ends_the_work_at_once_and_leaves_the_model_as_found(model, images, method, asked):
    before, questions = state(model), []

    def stopped():
        questions.append(None)
        return len(questions) == asked

    with pytest.raises(Stopped):
        explanation_of(model, images[0], 2, method, num_steps=50, stopped=stopped)
    assert len(questions) == asked
    assert state(model) == before


def test_a_step_without_a_number_is_not_the_best(model, images, monkeypatch):
    """The best step is named, as `opti_cam` finds it."""
    calls = []

    def broken(masked_logits, logits, class_idx):
        calls.append(1)
        return class_logit(masked_logits, class_idx) + (torch.nan if len(calls) == 2 else 0)

    monkeypatch.setattr(explorer, "find_method", lambda name: partial(opti_cam_map, objective=broken))
    found = explanation_of(model, images[0], 2, num_steps=5)
    assert found.objective.isnan().tolist() == [False, True, False, False, False, False]
    assert found.step == found.objective.nan_to_num(-torch.inf).argmax() != 1


def test_progress_counts_the_images_that_pass(model, images):
    told = []
    explanation_of(model, images[0], 2, num_steps=4, progress=told.append)
    assert told == list(range(1, 4 + 5))  # features, five evaluations, two in the end


def test_description_by_a_worked_example():
    # p = 1/4 and o = 5/8: no drop, gain (5/8 - 1/4)/(3/4) = 1/2
    logits, masked_logits = torch.tensor([1.0, 3.0]).log(), torch.tensor([5.0, 3.0]).log()
    saliency = torch.linspace(0, 1, 4).view(1, 2, 2)
    found = Explanation(
        "grad_cam", 0, torch.ones(3, 2, 2), logits, masked_logits, "softmax", saliency, 0, {}, logits[:1], logits[:1]
    )
    line = "Grad-CAM for cat: probability 25.0 % -> 62.5 % when masked (drop 0.0 %, gain 50.0 % of what was possible)"
    assert describe(found, ["cat", "dog"]) == describe(found, pd.Series(["cat", "dog"], index=[1, 0])) == line
    # and back: drop (5/8 - 1/4)/(5/8) = 3/5
    back = found._replace(logits=masked_logits, masked_logits=logits, saliency=torch.zeros(1, 2, 2))
    assert "62.5 % -> 25.0 % when masked (drop 60.0 %, gain 0.0 %" in describe(back, ["cat", "dog"])
    assert describe(back, ["cat", "dog"]).endswith("The map is constant: nothing is found.")
    # each class for itself: p = 1/(1 + 1/1) = 1/2 and o = 1/(1 + 1/5) = 5/6
    sigmoid = found._replace(head="sigmoid")
    assert "probability 50.0 % -> 83.3 % when masked (drop 0.0 %, gain 66.7 %" in describe(sigmoid, ["cat", "dog"])
    assert sigmoid.probs.tolist() == pytest.approx([1 / 2, 3 / 4])
    assert sigmoid.masked_probs.tolist() == pytest.approx([5 / 6, 3 / 4])


@pytest.mark.parametrize("method", ["opti_cam", "grad_cam"])
def test_networks_of_other_heads_are_explained(tiny, images, method):
    several, y = wrap(tiny, "features", head="sigmoid"), tiny(images[:1])[0].detach()
    found = explanation_of(several, images[0], 3, method, num_steps=2)
    assert found.probs.tolist() == pytest.approx((1 / (1 + (-y).exp())).tolist())
    masked = tiny(images[:1] * found.saliency)[0, 3].item()
    assert found.masked_prob[found.step].item() == pytest.approx(1 / (1 + np.exp(-masked)))
    single = wrap(torch.nn.Sequential(tiny, torch.nn.Linear(5, 1).double()), "0.features", class_names=["ill"])
    both = [explanation_of(single, images[0], c, method, num_steps=2) for c in (0, 1)]
    assert [both[0].probs.sum().item(), both[1].masked_probs.sum().item()] == pytest.approx([1, 1])
    assert describe(both[1], single.class_names).split(":")[0].endswith("for not ill")


def test_an_upload_is_read_like_a_file():
    buffer = io.BytesIO()
    Image.new("L", (8, 6), 77).save(buffer, format="png")
    photo = read_upload("gray.png", buffer.getvalue())
    assert (photo.size, photo.mode, photo.getpixel((3, 3))) == ((8, 6), "RGB", (77, 77, 77))
    with pytest.raises(OSError, match=r"^image: gray\.png is damaged or cannot be decoded"):
        read_upload("gray.png", buffer.getvalue()[:50])
    with pytest.raises(OSError, match=r"^image: text\.jpg is not an image that can be read$"):
        read_upload("text.jpg", b"hello")


def uploaded(name, content):
    stamp = datetime.now(UTC)
    return {"name": name, "type": "", "size": len(content), "content": memoryview(content), "last_modified": stamp}


@pytest.fixture
def page():
    return Explorer(photo=17, num_steps=2, compared=["fake_cam", "raw_attention", "grad_cam"])


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image.value)))


def test_the_page_opens_with_the_photo_and_its_likeliest_classes(page):
    assert page.class_choice.label == "bald eagle (50.8 %)"
    assert len(page.class_choice.options) == 5
    assert (pixels(page.photo) == (255 * to_picture(demo()[17].image)).round()).all()
    assert page.explanation is None
    bundle = page._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"].startswith("The page is alive only in a running notebook")


@pytest.mark.slow
def test_the_page_explains_and_goes_back(page):
    page.start(page.explain)
    page.wait()
    assert page.status.value.count("Opti-CAM for bald eagle: probability 50.8 %") == 1
    assert [label for label, _ in page.step.options] == ["0", "1", "2"]
    shown = pixels(page.masked)
    found = page.explanation
    assert (shown == (255 * to_picture(found.image * found.saliency)).round()).all()
    page.step.value = 0
    assert (pixels(page.masked) == (255 * to_picture(found.image * found.maps[0])).round()).all()
    assert page.step_outcome.value.startswith(f"logit {found.objective[0]:.2f}, probability ")
    page.class_search.value = "dalmatian"
    page.method_choice.value = "grad_cam"
    page.explain()
    assert "Grad-CAM for dalmatian" in page.status.value
    assert page.step.disabled
    assert page.curve.layout.display == "none"


@pytest.mark.slow
def test_the_page_compares_methods_and_says_which_do_not_apply(page):
    page.compare()
    assert list(page.comparison) == ["fake_cam", "grad_cam"]
    titles = [tile.children[0].value for tile in page.grid.children]
    assert [title.split(":")[0] for title in titles] == ["Fake-CAM", "Raw attention", "Grad-CAM"]
    assert "EfficientNet has no attention" in page.grid.children[1].children[1].value
    assert page.status.value.count("2 methods compared for bald eagle.") == 1


@pytest.mark.slow
def test_the_page_takes_another_photo(page):
    page.compare()
    page.photo_choice.index = 16
    page.wait()
    assert page.class_choice.label == "dalmatian (46.1 %)"
    assert page.comparison == {}
    buffer = io.BytesIO()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8))
    photo.save(buffer, format="png")
    page.upload.value = (uploaded("mine.png", buffer.getvalue()),)
    page.wait()
    assert page.photo_choice.label == "your upload"
    assert torch.equal(page.image, to_input(photo))


REFUSED = {
    "class": ("class_search", "unicorn", "class: wanted an index in 0..999 or a class name, got &#x27;unicorn&#x27;"),
    "index": ("class_search", "1000", "class: wanted an index in 0..999, got 1000"),
    "method": ("method_choice", "attention_rollout", "model: EfficientNet has no attention"),
    "upload": ("photo_choice", "upload", "photo: nothing is uploaded yet"),
    "damaged": (
        "upload",
        (uploaded("<b>.jpg", b"x"),),
        "image: &lt;b&gt;.jpg is not an image that can be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_page_says_in_one_sentence_what_it_refuses(page, case):
    control, value, message = REFUSED[case]
    getattr(page, control).value = value
    page.wait()
    page.start(page.explain) if case != "damaged" else None
    page.wait()
    assert message in page.status.value
    assert "\n" not in page.status.value
    assert page.explanation is None
    assert not page.explain_button.disabled


@pytest.mark.slow
def test_networks_that_cannot_be_had_are_refused_and_the_old_one_stays(page, monkeypatch):
    def refuse(name, **options):
        raise OSError(f"model: the weights of {name} could not be had")

    monkeypatch.setattr("opticam.lab.explorer.load_model", refuse)
    page.model_choice.value = "resnet50"
    page.wait()
    assert "model: the weights of resnet50 could not be had" in page.status.value
    page.model_choice.value = "efficientnet_lite0"
    page.wait()
    page.explain()
    assert page.explanation is not None


@pytest.mark.slow
def test_stop_ends_a_long_computation(page):
    page.steps.value = 1000
    page.start(page.explain)
    assert page.explain_button.disabled
    assert not page.stop_button.disabled
    begun = time.monotonic()
    while "of 1000 steps" not in page.status.value and time.monotonic() < begun + 60:
        time.sleep(0.01)
    page.stop_button.click()
    page.wait()
    assert "Stopped after " in page.status.value
    assert int(page.status.value.split("after ")[1].split(" of 1000")[0]) < 1000
    assert page.explanation is None
    assert not page.explain_button.disabled
    assert not any(module._forward_hooks for module in page.model.modules())
    assert not page.model.training
    page.steps.value = 1
    page.start(page.explain)
    page.wait()
    assert len(page.explanation.objective) == 2


def test_unknown_words_of_a_notebook_are_refused_at_once():
    with pytest.raises(ValueError, match=r"photo: wanted a number in 0\.\.19, got 20"):
        Explorer(photo=20)
    with pytest.raises(ValueError, match="method: wanted one of"):
        Explorer(compared=["grad_cam", "magic"])
    with pytest.raises(ValueError, match=r"num_steps: wanted a number in 0\.\.1000, got 2000"):
        Explorer(num_steps=2000)
    with pytest.raises(ValueError, match="model: wanted one of"):
        Explorer(model="magic")
