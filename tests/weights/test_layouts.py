"""Every key of a checkpoint and of the model is accounted for, whoever wrote the file."""

import json
import re

import pytest
import torch

from tests.parity import randomise
from tests.weights.conftest import Toy, ToyConfig, ToyTail
from vitrail.classifiers import Classifier
from vitrail.weights import load_weights, write_state
from vitrail.weights.layouts import best_fit, candidates, look_alikes
from vitrail_runtime.errors import InputError, listed


def backbone(**fields) -> Toy:
    model = Toy(ToyConfig(**fields))
    randomise(model)
    return model


def classifier(num_classes=3, **fields) -> Classifier:
    body = backbone(**fields)
    return Classifier(body, ToyTail(body.config, body.feature_specs, num_classes))


def foreign(num_classes=3, rows=2, dim=4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = {f"{p}.weight": torch.randn(dim, dim) for p in "qkv"}
    state |= {f"{p}.bias": torch.randn(dim) for p in "qkv"}
    state |= {"fc.weight": torch.randn(num_classes, 6), "fc.bias": torch.randn(num_classes)}
    state |= {"pre.weight": torch.randn(6, dim), "pre.bias": torch.randn(6)}
    state |= {"pos_embed": torch.randn(1, rows, dim), "index": torch.arange(3)}
    norm = torch.nn.BatchNorm1d(dim).state_dict()
    return state | {f"norm.{k}": v + 1 for k, v in norm.items()}


def load(model, source, entry, **options):
    body = model.backbone if isinstance(model, Classifier) else model
    return load_weights(model, source, entry, config=body.config, **options)


def test_a_foreign_layout_is_recognised_and_every_key_accounted_for(toy):
    model, state = classifier(), foreign()
    report = load(model, state, toy)
    assert report.layout == "foreign"
    assert set(report.used) == set(model.state_dict())
    assert report.left == ("index",)
    assert report.new == ()
    assert report.dropped_head == ()
    assert model.weights_report is report
    fused = torch.cat([state["q.weight"], state["k.weight"], state["v.weight"]])
    assert torch.equal(model.backbone.qkv.weight, fused)
    assert type(model.state_dict()["backbone.qkv.weight"]) is torch.Tensor


def test_our_own_weights_come_back_bit_for_bit(toy, tmp_path):
    source, target = classifier(), classifier()
    torch.nn.init.normal_(source.head.fc.weight)
    write_state(source.state_dict(), tmp_path / "w.safetensors")
    report = load(target, tmp_path / "w.safetensors", toy)
    assert report.layout == "vitrail"
    for key, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[key]), key


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.backbone."])
def test_a_backbone_alone_is_read_under_any_prefix(toy, prefix):
    source, target = backbone(), Toy(ToyConfig())
    report = load(target, {f"{prefix}{k}": v for k, v in source.state_dict().items()}, toy)
    assert report.layout == "vitrail"
    assert torch.equal(source.qkv.weight, target.qkv.weight)


def test_a_classifiers_file_fills_a_bare_backbone_and_leaves_the_head(toy):
    for state in (foreign(), classifier().state_dict()):
        target = Toy(ToyConfig())
        report = load(target, state, toy)
        assert set(report.used) == {f"backbone.{k}" for k in target.state_dict()}
        assert {"fc.weight", "head.fc.weight"} & set(report.left)


def test_a_file_without_a_head_leaves_the_models_as_it_was_and_says_so(toy):
    model = classifier()
    before = model.head.fc.weight.clone()
    report = load(model, backbone().state_dict(), toy)
    assert set(report.new) == {f"head.{k}" for k in model.head.state_dict()}
    assert "new in the model (4): head.pre.weight" in str(report)
    assert torch.equal(model.head.fc.weight, before)


def test_the_class_layer_is_dropped_only_when_the_number_of_classes_differs_and_said(toy):
    model, state = classifier(num_classes=7), foreign(num_classes=3)
    report = load(model, state, toy)
    assert report.dropped_head == ("head.fc.weight", "head.fc.bias")
    assert report.classes == (3, 7)
    assert "head dropped: the file has 3 classes, the model 7" in str(report)
    assert torch.equal(model.head.pre.weight, state["pre.weight"]), "the hidden layer is kept"


def test_a_head_that_differs_in_more_than_its_classes_is_an_error(toy):
    state = foreign()
    state["fc.weight"] = torch.zeros(3, 9)
    with pytest.raises(InputError, match=r"head.fc.weight: \(3, 6\) in the model, \(3, 9\) in the"):
        load(classifier(), state, toy)


def test_a_head_of_other_classes_and_another_width_is_an_error_too(toy):
    state = foreign(num_classes=3)
    state["fc.weight"] = torch.zeros(3, 9)  # its bias would do
    with pytest.raises(InputError, match=r"head.fc.weight: \(7, 6\) in the model, \(3, 9\) in the"):
        load(classifier(num_classes=7), state, toy)


def test_a_table_of_another_image_size_is_resampled_and_said(toy):
    for state in (foreign(rows=2), classifier().state_dict()):
        model = classifier(image_size=16)
        report = load(model, state, toy)
        assert report.resampled == ("backbone.pos_embed from (1, 2, 4) to (1, 4, 4)",)
        assert "resampled backbone.pos_embed" in str(report)


def test_keys_that_the_layout_allows_may_be_new_or_left(toy):
    state = {k: v for k, v in foreign().items() if not k.startswith("pre.")}
    report = load(classifier(), state, toy)
    assert report.new == ("head.pre.weight", "head.pre.bias")
    assert report.left == ("index",)


def test_a_missing_count_of_batches_is_no_error(toy):
    state = {k: v for k, v in foreign().items() if "num_batches" not in k}
    assert load(classifier(), state, toy).new == ("backbone.norm.num_batches_tracked",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, r"in the model, not in the file \(1\): backbone.norm.weight"),
        ({"extra.weight": torch.ones(1)}, r"in the file, not in the model \(1\): extra.weight"),
        ({"norm.bias": torch.ones(9)}, r"backbone.norm.bias: \(4,\) in the model, \(9,\) in the"),
        ({"norm.bias": torch.ones(4).char()}, "float32 in the model, int8 in the file"),
        ({"v.bias": None}, r"cannot be translated \(KeyError"),
    ],
)
def test_anything_else_is_an_error_and_the_model_stays_untouched(toy, change, message):
    state = {k: v for k, v in (foreign() | change).items() if v is not None}
    model = classifier()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        load(model, state, toy)
    assert "toy_small" in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_long_lists_are_cut_after_ten_with_the_count(toy):
    state = foreign() | {f"extra.{i}": torch.ones(1) for i in range(25)}
    with pytest.raises(InputError, match=r"not in the model \(25\): extra.0, .*\(25 in all\)"):
        load(classifier(), state, toy)


def test_weights_of_another_variant_name_it(toy):
    with pytest.raises(InputError, match=r"these weights look like toy_large") as caught:
        load(classifier(), foreign(dim=5), toy)
    assert "qkv.weight: (12, 4) in the model, (15, 5) in the file" in str(caught.value)


def test_weights_of_another_model_say_what_matched_and_what_did_not(toy):
    state = {"layer1.conv.weight": torch.ones(3), "norm.weight": torch.ones(4)}
    with pytest.raises(InputError) as caught:
        load(classifier(), state, toy)
    text = str(caught.value)
    assert "of the model's 12 keys 1 are in the file, 1 of them in the right shape" in text
    assert "layer1.conv.weight" in text
    with pytest.raises(InputError, match=r"in no layout that toy_small knows \(vitrail, foreign\)"):
        load(classifier(), {"layer1.conv.weight": torch.ones(3)}, toy)


def test_look_alikes_see_through_heads_wrappers_and_image_sizes(toy):
    assert look_alikes(foreign(num_classes=9, rows=5)) == [("toy_small", "foreign")]
    assert look_alikes(classifier(dim=5).state_dict()) == [("toy_large", "vitrail")]
    assert look_alikes(backbone(dim=5).state_dict()) == [("toy_large", "vitrail")]
    assert look_alikes({"a": torch.ones(1)}) == []


def test_the_backbone_of_a_detector_is_taken_from_among_its_parts(toy):
    state = {f"backbone.{k}": v for k, v in foreign().items() if not k.startswith(("fc", "pre"))}
    state |= {"neck.conv.weight": torch.ones(2), "roi_head.fc.bias": torch.ones(2)}
    report = load(Toy(ToyConfig()), state, toy)
    assert report.layout == "foreign"
    assert "neck.conv.weight" in report.left
    assert "took the part 'backbone.'" in str(report)


def test_of_two_layouts_that_may_be_meant_the_one_that_fits_is_taken(toy):
    """Keys under "backbone." look like ours; these are another library's."""
    state = {f"backbone.{k}": v for k, v in foreign().items() if not k.startswith(("fc", "pre"))}
    target = Toy(ToyConfig())
    assert candidates(state, classifier().state_dict(), toy) == ["vitrail"]
    assert load(target, state, toy).layout == "foreign"
    assert torch.equal(target.qkv.bias[4:8], state["backbone.k.bias"])


def test_the_report_says_line_by_line_what_became_of_every_key(toy):
    report = load(classifier(num_classes=7, image_size=16), foreign(num_classes=3), toy)
    assert str(report) == (
        "the mapping given: layout 'foreign', 10 keys used\n"
        "  head dropped: the file has 3 classes, the model 7 (head.fc.weight, head.fc.bias)\n"
        "  resampled backbone.pos_embed from (1, 2, 4) to (1, 4, 4)\n"
        "  left in the file (1): index"
    ).replace("the mapping given", report.source)


def test_a_count_of_batches_that_the_model_has_not_may_be_left(toy):
    report = load(classifier(), foreign() | {"other.num_batches_tracked": torch.tensor(3)}, toy)
    assert set(report.left) == {"index", "other.num_batches_tracked"}


def test_a_class_layer_is_not_dropped_where_the_names_of_a_layout_are_only_half_there(toy):
    state = foreign(num_classes=3)
    state["fc.bias"] = torch.zeros(4)  # three classes in one tensor, four in the other
    with pytest.raises(InputError, match="shapes differ"):
        load(classifier(num_classes=7), state, toy)


def test_all_marks_of_a_layout_are_asked_for(toy):
    state = {k: v for k, v in foreign().items() if not k.startswith("k.")}
    with pytest.raises(
        InputError, match=r"in no layout that toy_small knows|does not fit toy_small"
    ):
        load(classifier(), state, toy)
    assert candidates(foreign(), classifier().state_dict(), toy) == ["foreign"]
    assert candidates({"q.weight": torch.ones(1)}, classifier().state_dict(), toy) == []


def test_the_layout_with_the_fewest_problems_is_taken(toy):
    """A file whose keys bear both: ours fits wholly, the other's map would leave most of it."""
    model = classifier()
    state = {**model.state_dict()}
    assert best_fit(state, model.state_dict(), toy, model.backbone.config).layout == "vitrail"
    fit = best_fit(foreign(), model.state_dict(), toy, model.backbone.config)
    assert (fit.layout, fit.problems, fit.matched) == ("foreign", 0, 12)
    assert best_fit({"x": torch.ones(1)}, model.state_dict(), toy, model.backbone.config) is None


def test_lists_are_shown_to_the_limit_with_the_rest_counted():
    assert listed("abc") == "a, b, c"
    assert listed("abcd", limit=3) == "a, b, c, ... (4 in all)"
    assert listed([1, 2, 3], separator="; ", limit=1) == "1; ... (3 in all)"


def test_a_layout_can_be_named_and_an_unknown_one_lists_the_closest(toy):
    assert load(classifier(), foreign(), toy, layout="foreign").layout == "foreign"
    with pytest.raises(InputError, match="unknown layout of toy_small 'forein'; did you mean"):
        load(classifier(), foreign(), toy, layout="forein")
    with pytest.raises(InputError, match="read as layout 'vitrail'"):
        load(classifier(), foreign(), toy, layout="vitrail")


def test_half_precision_weights_fill_a_float_model(toy):
    model, state = (
        classifier(),
        {k: v.half() if v.is_floating_point() else v for k, v in foreign().items()},
    )
    load(model, state, toy)
    assert model.head.fc.weight.dtype == torch.float32
    assert torch.equal(model.head.fc.weight, state["fc.weight"].float())


def test_other_class_names_of_equal_number_are_an_error_that_shows_both(toy, tmp_path):
    model = classifier()
    write_state(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"classes": ["ant", "bee", "cat"]}))
    model.classes = ("ant", "bee", "dog")
    both = re.escape("3 classes ant, bee, cat") + ".*" + re.escape("3 classes ant, bee, dog")
    with pytest.raises(InputError, match=both):
        load(model, tmp_path, toy)
    model.classes = ("ant", "bee", "cat")
    assert "read model.safetensors in the folder" in str(load(model, tmp_path, toy))


def test_the_names_of_a_transformers_folder_are_compared_too(toy, tmp_path):
    model = classifier()
    write_state(model.state_dict(), tmp_path / "model.safetensors")
    labels = {"0": "ant, Formica rufa", "1": "bee", "2": "cat"}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    model.classes = ("bee", "ant", "cat")
    with pytest.raises(
        InputError, match=r"3 classes ant, Formica rufa, bee, cat, but .* bee, ant, cat; "
    ):
        load(model, tmp_path, toy)
    model.classes = ("Ant", "bee", "cat")
    assert "calls its" not in str(load(model, tmp_path, toy))
    model.classes = ("0", "1", "2")  # nobody named them: nothing to contradict, but worth saying
    assert "the file calls its 3 classes ant, Formica rufa, bee, cat" in str(
        load(model, tmp_path, toy)
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}})
    )
    model.classes = ("ant", "bee", "dog")
    load(model, tmp_path, toy)


def test_names_are_compared_only_where_there_are_as_many_and_a_head_to_name(toy, tmp_path):
    write_state(classifier().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"classes": ["ant", "bee", "cat"]}))
    model = classifier(num_classes=2)
    model.classes = ("dog", "emu")
    assert load(model, tmp_path, toy).classes == (3, 2)
    bare = backbone()
    bare.classes = ("dog", "emu", "fox")
    assert not any("classes" in note for note in load(bare, tmp_path, toy).notes)
    (tmp_path / "config.json").write_text(json.dumps({"classes": ["0", "1", "2"]}))
    model = classifier()
    model.classes = ("0", "1", "2")
    assert not any("classes" in note for note in load(model, tmp_path, toy).notes)


def test_a_model_on_meta_is_refused(toy):
    with torch.device("meta"):
        model = Toy(ToyConfig())
    with pytest.raises(InputError, match="meta device"):
        load(model, foreign(), toy)
