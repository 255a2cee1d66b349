import pytest
import torch
from torch import nn

from poolnet.errors import InputError
from poolnet.training.config import POOLS, TrainConfig
from poolnet.training.model import SimpleConvNet, SimplePoolNet, build_model


def test_pooling_by_hand():
    x = torch.arange(784.0).reshape(1, 1, 28, 28)
    # the top left 4x4 block holds 0..3, 28..31, 56..59, 84..87; blocks follow each other by 4, rows of blocks by 112
    steps = 4.0 * torch.arange(7) + 112.0 * torch.arange(7)[:, None]
    assert torch.equal(SimplePoolNet("max").features(x)[0], (87 + steps).flatten())
    assert torch.equal(SimplePoolNet("avg").features(x)[0], (43.5 + steps).flatten())
    assert torch.equal(SimplePoolNet("stride").features(x)[0], steps.flatten())
    squares = (x.reshape(7, 4, 7, 4) ** 2).double().mean((1, 3))  # the mean of four means of four
    torch.testing.assert_close(SimplePoolNet("lp").features(x)[0], squares.sqrt().float().flatten())


def test_lp_is_torchs_own_divided_by_two():
    x = torch.rand(3, 1, 28, 28) - 0.3
    torch.testing.assert_close(SimplePoolNet("lp").layer1(x), nn.LPPool2d(2, 2)(x) / 2)


def test_relu_stands_behind_each_pooling():
    x = torch.full((1, 1, 28, 28), -1.0)
    x[0, 0, 2:4, 2:4] = 3.0  # one of the four 2x2 blocks of the first feature
    assert SimplePoolNet("max").features(x)[0, 0] == 3.0
    assert SimplePoolNet("avg").features(x)[0, 0] == 0.75  # (0 + 0 + 0 + 3) / 4: negatives are gone before they count
    assert SimplePoolNet("avg").features(x)[0, 1] == 0.0


def test_the_notebooks_names():
    net = SimplePoolNet("max")
    assert list(net.state_dict()) == ["fc.weight", "fc.bias"]
    assert net.fc.weight.shape == (10, 49)
    assert isinstance(net.layer1, nn.MaxPool2d)
    assert isinstance(net.layer2, nn.MaxPool2d)
    assert isinstance(net.act, nn.ReLU)
    assert isinstance(SimplePoolNet("avg").layer2, nn.AvgPool2d)


@pytest.mark.parametrize("pool_type", ["min", "MAX", "", None, "conv"])
def test_any_other_pooling_is_refused_with_the_valid_names(pool_type):
    with pytest.raises(ValueError, match=r"expected one of max, avg, lp, stride$"):
        SimplePoolNet(pool_type)


@pytest.mark.parametrize("pool", POOLS)
def test_logits_are_the_classifier_on_the_features(pool):
    net = build_model(pool, seed=0)
    x = torch.rand(5, 1, 28, 28)
    assert net(x).shape == (5, 10)
    assert torch.equal(net(x), net.classifier(net.features(x)))
    assert net.features(x).shape[1] == net.classifier.in_features


def test_the_baseline_has_two_convolutions_to_seven_by_seven():
    net = SimpleConvNet()
    assert [type(layer) for layer in (net.layer1, net.layer2)] == [nn.Conv2d, nn.Conv2d]
    assert net.features(torch.zeros(1, 1, 28, 28)).shape == (1, 32 * 7 * 7)


def test_initial_weights_are_torchs_own_for_the_seed_and_the_global_generator_stays():
    torch.manual_seed(7)
    expected = SimplePoolNet("max").state_dict()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights = build_model("max", seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not torch.equal(build_model("max", seed=8).state_dict()["fc.weight"], expected["fc.weight"])


def test_the_commands_pools_are_those_that_can_be_built():
    assert [TrainConfig(pool=pool).pool for pool in POOLS] == ["max", "avg", "lp", "stride", "conv"]
    with pytest.raises(InputError, match="pool: found 'min', expected one of max, avg, lp, stride, conv"):
        TrainConfig(pool="min")
