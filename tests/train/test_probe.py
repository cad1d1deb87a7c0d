import json
import math

import pytest
import torch

from tests.train.conftest import VIT, tiny_config
from vitrail.cli import main
from vitrail.features import Features
from vitrail.models import create_model
from vitrail.train.loop import train
from vitrail.train.probe import knn_logits, linear_logits, pooled


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


@pytest.mark.parametrize("logits_of", [knn_logits, linear_logits])
def test_separable_features_are_told_apart(logits_of):
    features, labels = clusters(60, seed=0)
    queries, truth = clusters(30, seed=1)
    logits = logits_of(features, labels, queries, 3)
    assert (logits.argmax(1) == truth).float().mean() > 0.95


def test_the_linear_probe_reaches_the_optimum_that_scikit_learn_finds():
    linear_model = pytest.importorskip("sklearn.linear_model")
    from vitrail.train.probe import _regression

    features, labels = clusters(90, seed=2, spread=1.5)
    decay = 1e-2
    weight, bias = _regression(features, labels, 3, decay)
    # Its penalty is 1 / (2 C) of the squared norm against the sum, not the mean, of the losses.
    peer = linear_model.LogisticRegression(C=1 / (2 * decay * len(labels)), tol=1e-8, max_iter=1000)
    peer.fit(features.double().numpy(), labels.numpy())
    torch.testing.assert_close(weight.double(), torch.tensor(peer.coef_), atol=2e-3, rtol=0)
    assert (bias.double() - bias.double().mean()).tolist() == pytest.approx(
        (peer.intercept_ - peer.intercept_.mean()).tolist(), abs=2e-3
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
