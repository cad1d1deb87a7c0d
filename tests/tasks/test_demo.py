import numpy as np
import pytest

from vitrail.data.digits import SETS
from vitrail.recipes import RECIPES
from vitrail.tasks.demo import DEMOS, demo_of, mistake_first, worst_middle_best, wrong_right_crowded
from vitrail.tasks.task import TASKS
from vitrail_runtime.errors import InputError
from vitrail_runtime.prediction import Prediction


@pytest.mark.parametrize("task", DEMOS)
def test_a_demo_is_made_of_what_there_is(task):
    demo = demo_of(task)
    assert task in TASKS
    assert demo.digits in SETS
    assert demo.recipe in RECIPES
    assert demo.command.split()[:2] == ["vitrail", "demo"]


def test_no_two_demos_share_a_folder():
    assert len({demo.folder for demo in DEMOS.values()}) == len(DEMOS)


def test_a_classifiers_first_mistake_comes_before_right_answers():
    labels = np.arange(100) % 10
    predicted = labels.copy()
    predicted[[40, 70]] = 11
    order = mistake_first({"labels": labels, "predicted": predicted})
    assert order[0] == 40
    assert (predicted[order[1:]] == labels[order[1:]]).all()
    assert order[1:].tolist() == [0, 37, 76]
    order = mistake_first({"labels": labels, "predicted": labels})
    assert order.tolist() == [0, 37, 74]


def test_a_demo_of_no_task_is_refused_with_those_that_there_are():
    with pytest.raises(InputError, match=r"unknown task 'clasify'.*classify"):
        demo_of("clasify")


def test_the_worst_the_middle_and_the_best_image_are_shown():
    iou = np.array([0.5, np.nan, 0.9, 0.1, 0.6, 0.7])
    assert worst_middle_best({"mIoU": iou}).tolist() == [3, 4, 2]
    assert worst_middle_best({"mIoU": np.array([np.nan, 0.3])}).tolist() == [1, 1, 1]


def test_a_segmenters_answer_is_its_classes_and_their_shares():
    p = Prediction(np.array([0, 4]), np.array([0.9, 0.1], np.float32), ["background", "3"])
    assert demo_of("segment").answer(p) == "background 90.0%, 3 10.0%"


def test_a_detectors_worst_image_comes_before_those_without_a_mistake():
    said = {
        "objects": np.array([3, 5, 0, 4, 7]),
        "found": np.array([3, 2, 0, 4, 6]),
        "wrong": np.array([1, 0, 0, 0, 1]),
    }  # mistakes: 1, 3, 0, 0, 2
    assert wrong_right_crowded(said)[:3].tolist() == [1, 3, 2]


def test_a_detectors_sure_answers_are_shown_and_counted():
    demo = demo_of("detect")
    names, scores = ["3", "7", "3", "1"], np.array([0.9, 0.8, 0.5, 0.4], np.float32)
    p = Prediction(np.array([3, 7, 3, 1]), scores, names, boxes=np.ones((4, 4), np.float32))
    assert demo.answer(demo.shown(p)) == "2 3, 1 7"
    assert demo.answer(p.above(1)) == "nothing found"
    assert demo_of("classify").shown(p) is p
