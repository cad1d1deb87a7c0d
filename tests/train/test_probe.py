import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from torchvision import transforms

from tests.train.conftest import VIT, tiny_config
from vitrail.cli import main
from vitrail.data import digits, open_data
from vitrail.data.opening import hold_out
from vitrail.features import Features
from vitrail.models import create_model
from vitrail.tasks.probe import (
    DECAYS,
    choose_decay,
    extract_features,
    knn_logits,
    linear_logits,
    pooled,
    probe_scores,
    regression,
)
from vitrail.train.trainer import train
from vitrail_runtime.errors import InputError


def clusters(count: int, seed: int, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(3, 5) * 2 + 1
    labels = torch.arange(count) % 3
    return centres[labels] + spread * torch.randn(count, 5, generator=generator), labels


def test_neighbours_vote_by_their_nearness():
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    logits = knn_logits(features, labels, torch.tensor([[2.0, 0.0]]), 3, k=2, temperature=0.5)
    near, far = math.exp(1 / 0.5), math.exp(0.8 / 0.5)
    expected = torch.tensor([[near / (near + far), far / (near + far), 0.0]])
    torch.testing.assert_close(logits.exp(), expected, atol=2e-6, rtol=0)


def unbalanced(count: int, seed: int, *, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes around their centres in seven dimensions of unlike scale: many of class 0, none of 2."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 3], count, p=(0.6, 0.3, 0.1))
    features = np.eye(4, 7)[labels] * 2 + spread * rng.normal(size=(count, 7))
    features = features * np.logspace(-2, 1, 7) + 3
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def digests_of(features: torch.Tensor) -> list[str]:
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in features]


@pytest.mark.parametrize("k", [1, 20, 500])
def test_neighbours_vote_as_scikit_learns_do_with_the_papers_weights(k):
    features, labels = unbalanced(150, seed=0)
    queries, _ = unbalanced(40, seed=1)
    logits = knn_logits(features, labels, queries, 4, k=k, temperature=0.1)
    peer = KNeighborsClassifier(
        min(k, 150), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.1)
    )
    peer.fit(features.double().numpy(), labels.numpy())
    theirs = np.zeros((40, 4))
    theirs[:, peer.classes_] = peer.predict_proba(queries.double().numpy())
    np.testing.assert_allclose(logits.exp(), theirs, atol=1e-4)
    assert (logits[:, 2].exp() < 2e-6).all(), "a class without images gets no vote"


def test_twenty_neighbours_vote_at_the_papers_temperature():
    features, labels = unbalanced(90, seed=0)
    queries, _ = unbalanced(10, seed=1)
    papers = knn_logits(features, labels, queries, 4, k=20, temperature=0.07)
    torch.testing.assert_close(knn_logits(features, labels, queries, 4), papers, rtol=0, atol=0)


def test_more_queries_than_are_compared_at_once_get_their_own_answers():
    features, labels = unbalanced(30, seed=0)
    queries, _ = unbalanced(1030, seed=1)
    logits = knn_logits(features, labels, queries, 4)
    alone = knn_logits(features, labels, queries[-5:], 4)
    torch.testing.assert_close(logits[-5:], alone)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_gradient_of_the_linear_probes_objective_is_zero_at_its_solution(decay):
    features, labels = unbalanced(120, seed=2)
    x = ((features - features.mean(0)) / features.std(0)).double()
    weight, bias = (v.double() for v in regression(x.float(), labels, 4, decay))
    # d/dW of mean cross-entropy + decay |W|^2 is (p - y)^T x / N + 2 decay W; the bias has no decay.
    error = (x @ weight.T + bias).softmax(1) - torch.eye(4)[labels]
    assert (error.T @ x / 120 + 2 * decay * weight).abs().max() < 2e-4
    assert error.mean(0).abs().max() < 2e-4


def test_the_linear_probe_reaches_the_optimum_that_scikit_learn_finds():
    features, labels = clusters(90, seed=2, spread=1.5)
    decay = 1e-2
    weight, bias = regression(features, labels, 3, decay)
    # Its penalty is 1 / (2 C) of the squared norm against the sum, not the mean, of the losses.
    peer = LogisticRegression(C=1 / (2 * decay * len(labels)), tol=1e-8, max_iter=1000)
    peer.fit(features.double().numpy(), labels.numpy())
    torch.testing.assert_close(weight.double(), torch.tensor(peer.coef_), atol=2e-3, rtol=0)
    assert (bias.double() - bias.double().mean()).tolist() == pytest.approx(
        (peer.intercept_ - peer.intercept_.mean()).tolist(), abs=2e-3
    )


@pytest.mark.parametrize(
    ("seed", "spread", "expected"), [(5, 1.0, 1e-3), (3, 1.0, 1e-2), (3, 4.0, 1e-1)]
)
def test_the_decay_is_the_one_that_scikit_learn_finds_best_on_the_held_out_images(
    seed, spread, expected
):
    features, labels = unbalanced(150, seed=seed, spread=spread)
    x, digests = (features - features.mean(0)) / features.std(0), digests_of(features)
    held = hold_out(labels.numpy(), digests, 0.2, seed=0)
    count = int((~held).sum())
    scores = [
        cross_val_score(
            LogisticRegression(C=1 / (2 * decay * count), max_iter=2000),
            x.double().numpy(),
            labels.numpy(),
            cv=PredefinedSplit(np.where(held, 0, -1)),
            scoring="neg_log_loss",
        )[0]
        for decay in DECAYS
    ]
    assert choose_decay(x, labels, 4, digests) == DECAYS[int(np.argmax(scores))] == expected


def test_the_linear_probe_is_fitted_to_all_standardised_features_with_the_chosen_decay():
    features, labels = unbalanced(150, seed=3)
    queries, _ = unbalanced(20, seed=4)
    digests = digests_of(features)
    mean, std = features.mean(0), features.std(0)
    x = (features - mean) / std
    decay = choose_decay(x, labels, 4, digests)
    peer = LogisticRegression(C=1 / (2 * decay * 150), tol=1e-8, max_iter=2000)
    peer.fit(x.double().numpy(), labels.numpy())
    theirs = np.zeros((20, 4))
    theirs[:, peer.classes_] = peer.predict_proba(((queries - mean) / std).double().numpy())
    logits = linear_logits(features, labels, queries, 4, digests)
    # Class 2 has no images: the bias, which has no decay, sends its share towards zero.
    np.testing.assert_allclose(logits.softmax(1), theirs, atol=2e-3)


def test_the_order_of_the_images_changes_neither_the_decay_nor_a_bit_of_the_answers():
    features, labels = unbalanced(60, seed=5)
    features[7], labels[7] = features[3], labels[3]  # one image twice
    features[9], labels[9] = features[3], (labels[3] + 1) % 4  # and under another label
    queries, _ = unbalanced(9, seed=6)
    digests = digests_of(features)
    logits = linear_logits(features, labels, queries, 4, digests)
    for seed in range(2):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        shuffled = [digests[i] for i in order]
        again = linear_logits(features[order], labels[order], queries, 4, shuffled)
        torch.testing.assert_close(again, logits, rtol=0, atol=0)
    backwards = (features.flip(0), labels.flip(0), 4, digests[::-1])
    assert choose_decay(*backwards) == choose_decay(features, labels, 4, digests)


def test_a_fifth_of_every_class_is_held_out_however_rare_it_is(monkeypatch):
    """With every fifth image held out, a class of five images might have none or all of them there."""
    features, labels = unbalanced(150, seed=3)
    seen = []

    def remember(x, y, num_classes, decay):
        seen.append((len(x), torch.bincount(y, minlength=4)))
        return regression(x, y, num_classes, decay)

    monkeypatch.setattr("vitrail.tasks.probe.regression", remember)
    linear_logits(features, labels, features[:2], 4, digests_of(features))
    counts = torch.bincount(labels, minlength=4)
    assert len(seen) == len(DECAYS) + 1
    for size, learnt in seen[:-1]:
        assert (counts - learnt).tolist() == [round(0.2 * n) for n in counts.tolist()]
        assert size == 150 - (counts - learnt).sum()
    assert seen[-1][0] == 150


def test_a_feature_that_never_varies_says_nothing():
    features, labels = unbalanced(40, seed=5)
    constant = torch.cat([features, torch.full((40, 1), 7.0)], 1)
    queries = torch.cat([features[:5], torch.full((5, 1), 7.0)], 1)
    logits = linear_logits(constant, labels, queries, 4, digests_of(features))
    without = linear_logits(features, labels, features[:5], 4, digests_of(features))
    torch.testing.assert_close(logits.softmax(1), without.softmax(1), atol=1e-2, rtol=0)


def test_images_of_which_no_class_has_two_are_too_few():
    with pytest.raises(InputError, match=r"no class of the 3 images has two; .*--probe knn"):
        linear_logits(torch.rand(3, 4), torch.arange(3), torch.rand(2, 4), 3, ["a", "b", "c"])


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_what_a_probe_learns_never_depends_on_the_test_images(kind):
    train, test = unbalanced(60, seed=7), unbalanced(12, seed=8)
    classes, digests = ("a", "b", "c", "d"), digests_of(train[0])
    logits_of = knn_logits if kind == "knn" else (lambda *a: linear_logits(*a, digests))
    whole = logits_of(*train, test[0], 4)
    torch.testing.assert_close(logits_of(*train, test[0][3:5], 4), whole[3:5])
    poisoned = test[0].clone()
    poisoned[6:] = 1e4
    torch.testing.assert_close(logits_of(*train, poisoned, 4)[:6], whole[:6])

    scores = probe_scores(kind, train, test, classes, digests)
    predicted = whole.argmax(1)
    every = list(range(4))
    assert scores["confusion"] == confusion_matrix(test[1], predicted, labels=every).tolist()
    assert scores["top1"] == pytest.approx(accuracy_score(test[1], predicted))
    loss = log_loss(test[1], whole.double().softmax(1), labels=every)
    assert scores["loss"] == pytest.approx(loss, abs=1e-4)
    assert scores["classes"] == list(classes)
    assert [scores["per_class"][c]["support"] for c in classes] == np.bincount(test[1]).tolist()
    # Other labels of the same images: other scores, and the same answers.
    other = probe_scores(kind, train, (test[0], (test[1] + 1) % 4), classes, digests)
    assert np.sum(other["confusion"], 0).tolist() == np.sum(scores["confusion"], 0).tolist()


def test_features_are_extracted_in_the_datas_order_in_eval_mode(tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate(["b", "a", "a", "b", "a", "b"]):
        path = tmp_path / "train" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = (24, 40) if i % 2 else (33, 20)  # two sizes after "fit", in turn
        Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)).save(path)
    data = open_data(tmp_path, "all")
    torch.manual_seed(0)
    model = create_model("mobilenetv1_025", num_classes=2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    model.train()
    p = dataclasses.replace(model.preprocessing, size=(40, 40), mode="fit")
    features, labels = extract_features(model.backbone, data, p, batch_size=2)
    assert model.backbone.training
    assert labels.tolist() == data.truth.labels.tolist() == [0, 0, 0, 1, 1, 1]
    model.eval()
    normal = transforms.Compose([transforms.ToTensor(), transforms.Normalize(p.mean, p.std)])
    for key, row in zip(data.keys, features, strict=True):
        image = Image.open(tmp_path / key)
        longer = max(image.size)
        image = image.resize(
            (round(image.width * 40 / longer), round(image.height * 40 / longer)), 3
        )
        with torch.no_grad():
            maps = model.backbone(normal(image)[None]).maps
        torch.testing.assert_close(
            row, list(maps.values())[-1].mean((0, 2, 3)), atol=1e-5, rtol=1e-5
        )


def test_features_are_what_the_models_own_classifier_reads():
    features = Features({"c4": torch.full((2, 3, 4, 5), 7.0)}, torch.arange(12.0).view(2, 2, 3))
    config = create_model(
        "vit_tiny_patch16", num_classes=2, **{**VIT["model_fields"], "pool": "both"}
    )
    assert pooled(features, config.backbone.config).tolist()[0] == [0, 1, 2, 7, 7, 7]
    assert pooled(features, None).tolist()[0] == [7, 7, 7], "no token is read: the mean"


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_eval_probes_a_trained_model_by_its_folder(pictures, tmp_path, capsys, probe):
    run = tmp_path / "run"
    train(tiny_config(pictures, run, **VIT, epochs=1))
    assert main(["eval", str(run), "--data", str(pictures), "--probe", probe]) == 0
    assert "top-1" in capsys.readouterr().out
    scores = json.loads((run / f"eval-{probe}.json").read_text())
    assert scores["num_images"] == 12
    assert set(scores["per_class"]) == {"left", "right", "top"}


def test_eval_probes_a_model_by_its_name_and_says_that_its_weights_are_random(pictures, capsys):
    command = ["eval", "efficientvit_m0", "--data", str(pictures), "--image-size", "32"]
    assert main([*command, "--probe", "knn"]) == 0
    assert "random weights" in capsys.readouterr().err
    assert main(command) == 2
    assert "--probe" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "all"])
def test_a_probe_is_not_measured_on_the_pictures_that_it_learnt(split, capsys):
    assert main(["eval", "efficientvit_m0", "--data", "d", "--probe", "knn", "--split", split]) == 2
    assert f"--split {split} would measure it on what it has seen" in capsys.readouterr().err


def test_a_probe_refuses_data_without_labels(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(digits, "SHEETS", {"train": 2, "val": 1, "test": 1})
    data = digits.make_digits(tmp_path / "digits", task="semantic")
    assert main(["eval", "efficientvit_m0", "--data", str(data), "--probe", "knn"]) == 2
    assert (
        "a probe does the task 'classify', which learns from labels, but" in capsys.readouterr().err
    )
