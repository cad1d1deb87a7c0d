"""Capsules: a file is what was trained or is refused, and many tasks over one pass change nothing."""

import copy
import json
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vitrail
from tests.damage import flipped, outcomes, zeroed
from vitrail.adapt.capsules import TEXT, Capsules, capsule_of, read_capsule, save_capsule
from vitrail.classifiers import Classifier
from vitrail.learnable_memory import Readers, build
from vitrail.models import create_backbone, create_model, load, save
from vitrail.weights import read_metadata, read_state, write_state
from vitrail.weights.files import DIGEST, read_safetensors
from vitrail_runtime.errors import InputError, NewerVersion

FIELDS = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 8,
    "image_size": (24, 40),
    "mlp_ratio": 2.0,
}
NAME = "vit_tiny_patch16"
CLASSES = ("ash", "oak", "yew")


def drawn(model: nn.Module, seed: int) -> nn.Module:
    """The model with weights as large as trained ones, in eval mode: those of a new head are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            parameter.data.normal_(0, 0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    model = create_model(NAME, classes=CLASSES, **FIELDS)
    for parameter in model.backbone.parameters():
        parameter.data.normal_(0, 0.3)
    return drawn(model, 0)


def task(base, classes=("crow", "jay"), *, seed=1, head=None, **fields):
    """A trained memory/... model on the base."""
    weights = {"backbone": base.backbone.state_dict()}
    fields = {**FIELDS, **fields}
    model = create_model(f"memory/{NAME}", classes=classes, weights=weights, head=head, **fields)
    return drawn(model, seed)


def images(count=2, seed=5):
    return torch.randn(count, 3, 24, 40, generator=torch.Generator().manual_seed(seed))


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# Many tasks, one pass

HEADS = [{}, {"rows": 1}, {"rows": 0}, {"norm_memory": False}, {"norm": "own"}, {"start": "zero"}]


@pytest.fixture(scope="module")
def tasks(base):
    """A model and its capsule for each kind of head."""
    models = [
        task(base, tuple("abcdef")[: i + 1], seed=i, head=head) for i, head in enumerate(HEADS)
    ]
    return [(model, capsule_of(model, f"task.{i}")) for i, model in enumerate(models)]


@settings(max_examples=12)
@given(order=st.permutations(range(len(HEADS))), count=st.integers(0, len(HEADS)), data=st.data())
def test_what_is_attached_changes_neither_the_base_nor_another_task_by_a_bit(
    base, tasks, order, count, data
):
    x = images(data.draw(st.integers(1, 3)))
    both = Capsules(base)
    for i in order[:count]:
        both.attach(tasks[i][1])
    gone = data.draw(st.sets(st.sampled_from(order[:count]))) if count else set()
    for i in gone:
        both.detach(f"task.{i}")
    left = [i for i in order[:count] if i not in gone]
    found = both.predict(x)
    assert tuple(found) == ("base", *both.names)
    assert both.names == tuple(f"task.{i}" for i in left)
    classes = {f"task.{i}": tasks[i][0].classes for i in left}
    assert both.classes == {"base": CLASSES} | classes
    with torch.no_grad():
        assert torch.equal(found["base"], base(x))
        for i in left:  # alone, with a pass of its own
            assert torch.equal(found[f"task.{i}"], tasks[i][0](x))


def test_one_pass_serves_all_and_computes_nothing_of_a_task_for_the_tokens_of_the_base(base, tasks):
    seen = []
    block = base.backbone.blocks[0]
    watch = block.attn.qkv.register_forward_hook(
        lambda _, given, __: seen.append(given[0].shape[1])
    )
    try:
        both = Capsules(base)
        for _, capsule in tasks:
            both.attach(capsule)
        both.predict(images())
    finally:
        watch.remove()
    assert seen == [1 + 15, *[1] * len(tasks)]  # class token and patches once, then a token a task


def test_keys_and_values_are_read_as_they_come_and_none_is_kept(base, tasks, monkeypatch):
    handed, alive = [], []
    append = Readers.append

    def watched(self, kv):
        handed.append(weakref.ref(kv.keys))
        alive.append(sum(ref() is not None for ref in handed))
        append(self, kv)

    monkeypatch.setattr(Readers, "append", watched)
    both = Capsules(base)
    both.attach(tasks[0][1])
    both.predict(images())
    assert alive == [1] * FIELDS["depth"]


def test_a_bare_backbone_gives_the_tasks_alone(base, tasks):
    model, capsule = tasks[0]
    alone = Capsules(base.backbone)
    assert alone.preprocessing is None
    alone.attach(capsule, "trees")
    assert alone.preprocessing == model.preprocessing
    found = alone.predict(images())
    assert same(found, {"trees": model(images())})
    alone.detach("trees")
    assert alone.preprocessing is None


def test_a_task_can_be_taken_out_as_a_model_of_its_own(base, tasks, tmp_path):
    model, capsule = tasks[4]
    both = Capsules(base)
    name = both.attach(capsule)
    out = both.model(name)
    assert out.backbone is base.backbone
    assert (out.classes, out.info.name) == (model.classes, f"memory/{NAME}")
    save(out, tmp_path / "m")
    assert same(load(tmp_path / "m").state_dict(), model.state_dict())
    out.head.fc.weight.data.zero_()  # what becomes of it is nothing to those attached
    assert torch.equal(both.predict(images())[name], model(images()))


def test_modes_gradients_and_the_base_are_left_as_they_were(base, tasks):
    base.train()
    base.backbone.blocks[1].eval()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    modes = {n: m.training for n, m in base.named_modules()}
    try:
        both = Capsules(base)
        both.attach(tasks[0][1])
        found = both.predict(images())
        assert {n: m.training for n, m in base.named_modules()} == modes
    finally:
        base.eval()
    assert same(base.state_dict(), before)
    assert not found["base"].requires_grad
    assert both(images())["task.0"].requires_grad


def test_tasks_answer_in_the_precision_of_the_base(base, tasks):
    exact = create_model(NAME, classes=CLASSES, weights=base.state_dict(), **FIELDS).double()
    both = Capsules(exact)
    both.attach(tasks[0][1])
    found = both.predict(images())["task.0"]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), tasks[0][0](images()), atol=1e-4, rtol=1e-4)


def test_the_folder_of_a_model_or_of_a_run_is_a_base(base, tasks, tmp_path):
    save(base, tmp_path / "run" / "best")
    tasks[1][1].model(base.backbone)
    save_capsule(tasks[1][0], tmp_path / "t.capsule")
    for folder in (tmp_path / "run", str(tmp_path / "run" / "best")):
        both = vitrail.Capsules(folder)
        assert both.attach(tmp_path / "t.capsule") == "t"
        assert same(both.predict(images()), {"base": base(images()), "t": tasks[1][0](images())})


def test_what_is_no_batch_of_images_is_refused(base):
    both = Capsules(base)
    told = r"a float tensor \(B, 3, H, W\), preprocessed, but got list; files are read by"
    with pytest.raises(InputError, match=told):
        both.predict(["a.jpg"])
    with pytest.raises(InputError, match=r"but got torch\.uint8"):
        both.predict(torch.zeros(1, 3, 24, 40, dtype=torch.uint8))
    with pytest.raises(InputError, match="add a batch axis"):
        both.predict(torch.zeros(3, 24, 40))


# The file


def test_a_file_gives_back_what_was_saved(base, tmp_path):
    model = task(base, CLASSES, seed=3, head={"rows": 2, "norm": "own", "start": "zero"})
    path = tmp_path / "sub" / "trees.v2.capsule"
    metrics = {"top1": 0.75, "num_images": 40, "classes": ["ash"], "confusion": [[1]]}
    metrics |= {"whole": True, "loss": float("nan"), "ratio": float("inf"), "why": "text"}
    written = save_capsule(model, path, metrics=metrics)
    found = read_capsule(str(path))
    assert found == replace(written, state=found.state)
    assert same(found.state, model.head.state_dict())
    assert (found.name, found.task, found.classes) == ("trees.v2", "classify", CLASSES)
    assert found.head == model.head.config
    assert found.base.name == NAME
    assert found.base.config == base.backbone.config
    assert found.preprocessing == model.preprocessing
    assert found.metrics == {"top1": 0.75, "num_images": 40.0}
    assert path.stat().st_size < 4 * sum(p.numel() for p in model.head.parameters()) + 2500
    assert save_capsule(model, path, "oaks").name == read_capsule(path).name == "oaks"


def test_the_file_of_a_usual_capsule_has_about_a_hundred_kilobytes(tmp_path):
    model = create_model("memory/vit_small_patch16", num_classes=20)
    save_capsule(model, tmp_path / "c.capsule")
    assert 90_000 < (tmp_path / "c.capsule").stat().st_size < 130_000


def test_every_damage_of_a_file_is_found(base, tmp_path):
    path = tmp_path / "t.capsule"
    model = task(base)
    save_capsule(model, path)
    good = read_capsule(path)

    def whole() -> bool:
        found = read_capsule(path)
        return found == replace(good, state=found.state) and same(found.state, good.state)

    content = path.read_bytes()
    count = outcomes(path, zeroed(content), whole)
    count += outcomes(path, flipped(content, 120), whole)
    count += outcomes(path, (content[:n] for n in range(0, len(content), 997)), whole)
    assert count["silent"] == count["traceback"] == count["equal"] == 0
    assert whole()


def rewritten(path, **changes):
    """The file with other texts, and a digest that fits them."""
    texts, state = read_metadata(path), read_safetensors(path)
    del texts[DIGEST]
    about = json.loads(texts[TEXT]) | changes
    write_state(state, path, metadata={TEXT: json.dumps(about)})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema_version": 2}, r"schema 2, but this vitrail reads 1; a newer vitrail wrote it"),
        ({"schema_version": 0}, r"schema 0, but this vitrail reads 1; train it again"),
        ({"name": "base"}, r"cannot be called 'base'"),
        ({"name": 3}, r"name is 3, but must be str"),
        ({"colour": "red"}, r"unknown key in .*'colour'"),
        ({"classes": ["a", "a"]}, r"class names must differ"),
        ({"classes": ["a", "b", "c"]}, r"does not hold what it says: fc.bias, fc.weight differ"),
        ({"head": {"rows": 4}}, r"does not hold what it says: memory differ"),
        ({"head": {"row": 4}}, r"unknown key in .*'row'"),
        ({"base": {"name": "vit_tine_patch16", "config": {}, "sha256": ""}}, r"unknown model"),
        ({"base": {"name": NAME}}, r"lacks 'config', 'sha256'"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_refused(base, tmp_path, changes, told):
    path = tmp_path / "t.capsule"
    save_capsule(task(base), path)
    rewritten(path)
    read_capsule(path)
    rewritten(path, **changes)
    with pytest.raises(InputError, match=told) as error:
        read_capsule(path)
    assert isinstance(error.value, NewerVersion) == (changes.get("schema_version") == 2)


def test_what_is_no_capsule_is_told(base, tmp_path):
    model = task(base)
    save(model, tmp_path / "m")
    cases = {
        tmp_path: "is a folder; a capsule is a file",
        tmp_path / "none.capsule": "is not there; a capsule is a file",
        tmp_path / "m" / "model.safetensors": r"is no capsule: .*\(it holds a whole model\)",
    }
    (tmp_path / "text.capsule").write_text("birds")
    cases[tmp_path / "text.capsule"] = "is not a whole safetensors file"
    write_state(model.state_dict(), tmp_path / "other.safetensors")
    cases[tmp_path / "other.safetensors"] = "is no capsule: its header says nothing of a task; "
    for path, told in cases.items():
        with pytest.raises(InputError, match=told) as error:
            read_capsule(path)
        assert str(path) in str(error.value)
    save_capsule(model, tmp_path / "t.capsule")
    bare = {TEXT: read_metadata(tmp_path / "t.capsule")[TEXT]}
    safetensors_torch = pytest.importorskip("safetensors.torch")
    state = read_state(tmp_path / "m")
    safetensors_torch.save_file(state, tmp_path / "bare.capsule", metadata=bare)
    with pytest.raises(InputError, match="is damaged: its digest is missing"):
        read_capsule(tmp_path / "bare.capsule")


def test_a_model_without_memory_and_a_wrong_ending_or_name_are_refused(base, tmp_path):
    with pytest.raises(
        InputError, match="Classifier has no memory to make a capsule of; train one"
    ):
        save_capsule(base, tmp_path / "t.capsule")
    with pytest.raises(InputError, match=r"let t.pth end in .capsule or .safetensors"):
        save_capsule(task(base), tmp_path / "t.pth")
    for name in ("base", "", "a\nb", 3):
        with pytest.raises(InputError, match="a capsule cannot be called"):
            save_capsule(task(base), tmp_path / "t.capsule", name)
    assert not list(tmp_path.iterdir())


def test_a_capsule_takes_the_place_of_a_capsule_and_of_nothing_else(base, tmp_path):
    one, other = task(base), task(base, CLASSES, seed=2)
    save_capsule(one, tmp_path / "t.capsule")
    save_capsule(other, tmp_path / "t.capsule")
    assert read_capsule(tmp_path / "t.capsule").classes == CLASSES
    save(base, tmp_path / "base")
    (tmp_path / "text.capsule").write_text("birds")
    (tmp_path / "empty.capsule").touch()
    (tmp_path / "folder.capsule").mkdir()
    for name in ("base/model.safetensors", "text.capsule", "empty.capsule", "folder.capsule"):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        told = f"{name} is there already and is no capsule, .*; name another file"
        with pytest.raises(InputError, match=told):
            save_capsule(one, tmp_path / name)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_tells_no_name_and_classes_makes_no_capsule_and_no_base(base, tmp_path):
    model = task(base)
    bare = build(base.backbone, model.head.config, 2)
    told = (
        "this MemoryClassifier does not tell its name and classes; take one of vitrail.create_model"
    )
    with pytest.raises(InputError, match=told):
        save_capsule(bare, tmp_path / "t.capsule")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="this Classifier does not tell its name and classes"):
        Capsules(Classifier(base.backbone, base.head))
    for other in (None, 3, model):
        told = f"attach takes the path of a capsule, .* not {type(other).__name__}"
        with pytest.raises(InputError, match=told):
            Capsules(base).attach(other)


def test_a_capsule_holds_float32_whatever_its_model_computed_in(base, tmp_path):
    model = task(base)
    capsule = save_capsule(copy.deepcopy(model).double(), tmp_path / "t.capsule")
    want = model.head.state_dict()
    for state in (capsule.state, read_capsule(tmp_path / "t.capsule").state):
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert same(state, want)


def test_a_task_taken_out_leaves_the_mode_of_the_base(base, tasks):
    both = Capsules(base)
    name = both.attach(tasks[0][1])
    try:
        for training in (True, False):
            base.train(training)
            alone = both.model(name)
            assert {m.training for m in base.modules()} == {training}
            assert {m.training for m in alone.head.modules()} == {False}
    finally:
        base.eval()


# What does not go together


def refused(both: Capsules, capsule, told: str, name=None) -> None:
    before, answers = both.names, both.predict(images())
    with pytest.raises(InputError, match=told):
        both.attach(capsule, name)
    assert both.names == before
    assert same(both.predict(images()), answers)


def test_another_base_is_refused_by_name_config_or_weights(base, tasks):
    capsule = tasks[0][1]
    other = create_model("deit_tiny_patch16", classes=CLASSES, **FIELDS)
    told = "'task.0' was trained on vit_tiny_patch16, but this base is deit_tiny_patch16; attach"
    refused(Capsules(other), capsule, told)
    wide = create_backbone(NAME, **FIELDS | {"norm_eps": 1e-5})
    told = "a vit_tiny_patch16 of another config than this base: norm_eps 1e-06 instead of 1e-05; attach"
    refused(Capsules(wide), capsule, told)
    # Of as many positions and the same weights: other fields that a pass reads.
    for field, value, there in (("image_size", [24, 39], [24, 40]), ("pos_antialias", False, True)):
        fields = FIELDS | {field: tuple(value) if field == "image_size" else value}
        weights = {"backbone": base.backbone.state_dict()}
        near = Capsules(create_backbone(NAME, weights=weights, **fields))
        told = rf"than this base: {field} {there} instead of {value}; attach"
        refused(near, capsule, told.replace("[", r"\[").replace("]", r"\]"))
    moved = create_backbone(NAME, weights={"backbone": base.backbone.state_dict()}, **FIELDS)
    Capsules(moved).attach(capsule)
    moved.norm.bias.data[3] += 1e-6
    told = r"other weights of vit_tiny_patch16 than this base has \(sha256 differs\); attach"
    refused(Capsules(moved), capsule, told)


def test_what_only_training_and_heads_read_of_the_config_makes_no_other_base(base, tasks):
    fields = FIELDS | {"drop_path_rate": 0.3, "pool": "avg", "out_blocks": (0, 2)}
    other = create_backbone(NAME, weights={"backbone": base.backbone.state_dict()}, **fields)
    both = Capsules(other)
    both.attach(tasks[0][1])
    assert torch.equal(both.predict(images())["task.0"], tasks[0][0](images()))


def test_images_seen_in_another_way_are_refused_by_field(base, tasks):
    both = Capsules(base)
    both.attach(tasks[0][1])
    other = tasks[1][1]
    pre = other.preprocessing
    for changes, told in (
        (
            {"mode": "squash"},
            r"one pass sees them once: mode 'squash' instead of 'crop'; train one",
        ),
        (
            {"mean": (0.1, 0.5, 0.5)},
            r"once: mean \[0.1, 0.5, 0.5\] instead of \[0.5, 0.5, 0.5\]; train one",
        ),
        ({"size": (24, 24)}, r"once: size \[24, 24\] instead of \[24, 40\]; train one"),
    ):
        changed = replace(other, preprocessing=replace(pre, **changes))
        refused(both, changed, told)
        bare = Capsules(base.backbone)
        bare.attach(changed)
        refused(bare, tasks[0][1], "sees images in another way")


def test_a_name_stands_once_and_one_that_is_not_there_is_told(base, tasks):
    both = Capsules(base)
    both.attach(tasks[0][1], "trees")
    refused(both, tasks[1][1], "a capsule called 'trees' is attached already; give this", "trees")
    refused(both, tasks[1][1], "a capsule cannot be called 'base'", "base")
    for ask in (both.detach, both.model):
        with pytest.raises(InputError, match=r"unknown capsule 'tree'; did you mean 'trees'\?"):
            ask("tree")


def test_memory_that_the_whole_network_sees_is_refused_with_the_reason(base, tmp_path):
    save_capsule(task(base, head={"form": "full"}), tmp_path / "t.capsule")
    told = "is of form='full': all tokens of the backbone attend to its memory, so that it needs a pass"
    refused(Capsules(base), tmp_path / "t.capsule", told)


def test_what_is_no_plain_vit_is_refused(base):
    conv = create_model("efficientvit_m0", num_classes=2)
    with pytest.raises(InputError, match="read by the class token of a plain ViT, which this"):
        Capsules(conv)
    for other in (
        conv.backbone,
        task(base),
        create_model(f"linear/{NAME}", num_classes=2, **FIELDS),
    ):
        told = f"on a plain ViT, or a classifier on one, not on {type(other).__name__}; of a model"
        with pytest.raises(InputError, match=told):
            Capsules(other)


def test_a_base_that_changes_after_a_capsule_was_attached_takes_no_other(base):
    changed = Capsules(copy.deepcopy(base))
    changed.attach(capsule_of(task(base), "first"))
    changed.backbone.blocks[1].mlp.fc1.weight.data.mul_(2)
    with pytest.raises(InputError, match="'second' was trained on other weights"):
        changed.attach(capsule_of(task(base), "second"))


def test_rounded_weights_are_told_and_answer_once_capsules_are_attached(base):
    model = task(base)
    capsule = capsule_of(model, "birds")
    rounded = Capsules(copy.deepcopy(base)).bfloat16()
    told = r"base are in torch.bfloat16, .* in torch.float32: make and attach capsules first"
    for call in (
        lambda: rounded.attach(capsule),
        lambda: capsule_of(copy.deepcopy(model).bfloat16(), "birds"),
    ):
        with pytest.raises(InputError, match=told):
            call()
    first = Capsules(copy.deepcopy(base))
    first.attach(capsule)
    logits = first.bfloat16().predict(images())["birds"]
    assert logits.dtype == torch.bfloat16
    want = model(images())
    assert (logits - want).abs().max() < 0.1 * want.abs().max()
