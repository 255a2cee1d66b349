"""The figures of a run, as they are laid out."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from poolnet.data.dataset import LETTERS, Split
from poolnet.runs import figures
from poolnet.training.evaluation import Evaluation

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
LONGER = ("$x^2$ and " * 9, "漢字" * 20, *(name * 4 for name in FASHION[2:]))


@pytest.mark.parametrize("classes", [tuple(LETTERS), FASHION, LONGER], ids=["letters", "fashion", "longer"])
def test_names_of_classes_are_inside_and_apart_from_each_other(classes):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(10), 4)
    evaluation = Evaluation(0.5, 0.5, rng.normal(size=(40, 10)).astype(np.float32), y)
    split = Split("test", rng.integers(0, 256, (40, 28, 28)).astype(np.uint8), y, "")
    for figure in (
        figures.confusion_matrix(evaluation, "title", classes),
        figures.classifier_weights(rng.normal(size=(10, 49)), "title", classes),
        figures.worst_mistakes(evaluation, split, "title", classes),
    ):
        FigureCanvasAgg(figure).draw()
        axes = figure.axes[0]
        texts = [*axes.texts, *(axes.get_xticklabels() + axes.get_yticklabels() if axes.axison else ())]
        places = [text.get_window_extent() for text in texts]
        assert len(places) >= 10
        for box in places:
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        level = [box for text, box in zip(texts, places, strict=True) if not text.get_rotation()]
        assert not [1 for one, other in combinations(level, 2) if one.overlaps(other)]  # the boxes of turned ones do
