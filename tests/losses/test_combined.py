"""A weighted sum of losses, each with its own entries of the target."""

import copy

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceLoss
from torch import nn

from medconstraints.formulations import Lagrangian, LogBarrierExtension, QuadraticPenalty, ReLULagrangian
from medconstraints.losses import BoxPriorLoss, CombinedLoss, ConstraintLoss, PartialCrossEntropyLoss
from medconstraints.losses.base import Probabilities, TargetLoss
from medconstraints.statistics import soft_mean_intensity, soft_size


@pytest.fixture
def logits():
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target():
    label = torch.zeros(2, 1, 8, 8)
    label[:, :, 2:6, 3:7] = 1
    return {
        "boxes": torch.tensor([[[1, 2, 3, 6, 7]], [[1, 2, 3, 6, 7]]]),
        "label": label,
        "sizes": torch.tensor([[[[-torch.inf, torch.inf]], [[10.0, 20.0]]]] * 2),
    }


def parts():
    return {
        "boxes": BoxPriorLoss(LogBarrierExtension(), softmax=True),
        "dice": DiceLoss(softmax=True, to_onehot_y=True),
    }


def size_loss(formulation=None, **options):
    return ConstraintLoss(soft_size, formulation or QuadraticPenalty(), softmax=True, **options)


class Counted(TargetLoss):
    """Mean of the input times a factor; counts its calls, and looks back at the last one."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, input, target):
        self.calls += 1
        return self.factor * input.mean()

    def terms(self):
        return {"calls": torch.tensor(float(self.calls))}


# The sum


def test_value_and_gradient_are_the_weighted_sum(logits, target):
    losses, results = parts(), []
    for function in (
        CombinedLoss(losses, weights={"boxes": 0.3, "dice": 2.0}),
        lambda x, y: 0.3 * losses["boxes"](x, y["boxes"]) + 2.0 * losses["dice"](x, y["label"]),
    ):
        own = logits.clone().requires_grad_()
        value = function(own, target)
        value.backward()
        results.append((value.detach(), own.grad))
    assert results[0][0].shape == ()
    torch.testing.assert_close(*results)


def test_a_plain_tensor_goes_to_every_loss(logits, target):
    loss = CombinedLoss({"a": nn.CrossEntropyLoss(), "b": nn.CrossEntropyLoss()}, weights={"b": 2.0})
    label = target["label"][:, 0].long()
    torch.testing.assert_close(loss(logits, label), 3 * nn.CrossEntropyLoss()(logits, label))


@pytest.mark.parametrize("skip", [False, True])
def test_weights_are_read_at_every_pass(logits, target, skip):
    losses = {"one": Counted(1.0), "two": Counted(10.0)}
    loss = CombinedLoss(losses, weights={"two": 0.0}, skip_unweighted=skip)
    torch.testing.assert_close(loss(logits, target), logits.mean())
    assert [part.calls for part in losses.values()] == [1, 1 - skip]
    assert set(loss.terms()) == {"one", "one_calls"} | (set() if skip else {"two", "two_calls"})
    loss.weights["two"] = 0.5  # as a schedule does: from the next pass on
    torch.testing.assert_close(loss(logits, target), 6 * logits.mean())
    assert [part.calls for part in losses.values()] == [2, 2 - skip]
    assert set(loss.terms()) == {"one", "one_calls", "two", "two_calls"}
    loss.weights["two"] = -0.1  # only 0 is left out
    torch.testing.assert_close(loss(logits, target), 0 * logits.mean(), atol=1e-7, rtol=0)


def test_a_loss_that_is_left_out_needs_no_target_and_has_no_residuals(logits, target):
    size = size_loss()
    loss = CombinedLoss({"size": size, "one": Counted()}, keys={"size": {"bounds": "sizes"}}, skip_unweighted=True)
    loss(logits, target)
    assert size.last is not None and "size" in loss.terms()
    loss.weights["size"] = 0.0
    torch.testing.assert_close(loss(logits, {"label": target["label"]}), logits.mean())
    assert size.last is None and set(loss.terms()) == {"one", "one_calls"}


@pytest.mark.parametrize("skip", [False, True])
def test_with_all_weights_0_there_is_a_gradient_of_0(logits, target, skip):
    loss = CombinedLoss(parts(), weights={"boxes": 0, "dice": 0}, skip_unweighted=skip)
    own = MetaTensor(logits).requires_grad_()
    value = loss(own, target)
    value.backward()
    assert type(value) is torch.Tensor
    assert (value.shape, value.item(), own.grad.abs().max().item()) == ((), 0, 0)
    assert (loss.terms() == {}) == skip


def test_terms(logits, target):
    loss = CombinedLoss(parts(), weights={"boxes": 0.5})
    value = loss(logits.requires_grad_(), target)
    terms = loss.terms()
    assert {"boxes", "dice", "boxes_tightness", "boxes_size", "boxes_emptiness"} <= set(terms)
    assert all(term.shape == () and not term.requires_grad for term in terms.values())
    torch.testing.assert_close(terms["boxes"] + terms["dice"], value.detach())
    unweighted = terms["boxes_tightness"] + terms["boxes_size"] + terms["boxes_emptiness"]
    torch.testing.assert_close(0.5 * unweighted, terms["boxes"])


def test_probabilities_are_made_once_for_each_activation(logits, target, monkeypatch):
    made = []
    init = Probabilities.__init__
    monkeypatch.setattr(Probabilities, "__init__", lambda self, *args: (made.append(args[1:]), init(self, *args))[1])
    losses = {"a": size_loss(), "b": size_loss(), "sharp": size_loss(logit_scale=3.0)}
    keys = {name: {"bounds": "sizes"} for name in losses}
    value = CombinedLoss(losses, keys=keys)(logits, target)
    assert made == [("softmax", 1.0), ("softmax", 3.0)]
    expected = 2 * losses["a"](logits, target["sizes"]) + losses["sharp"](logits, target["sizes"])
    torch.testing.assert_close(value, expected)


def test_state_of_the_parts_is_kept():
    loss, other = CombinedLoss(parts()), CombinedLoss(parts())
    loss.losses["boxes"].formulation.step()
    other.load_state_dict(loss.state_dict())
    assert list(loss.state_dict()) == ["losses.boxes.formulation.t"]
    assert torch.equal(other.losses["boxes"].formulation.t, loss.losses["boxes"].formulation.t)


# Entries of the target


def test_declares_what_its_losses_read(target):
    lagrangian = Lagrangian(2, learning_rate=0.1)
    intensity = ConstraintLoss(soft_mean_intensity, QuadraticPenalty())
    losses = {"dice": DiceLoss(), "size": size_loss(), "exact": size_loss(lagrangian), "intensity": intensity}
    keys = {"size": {"bounds": "sizes", "spacing_mm": "spacing"}, "exact": {"bounds": "sizes"}}
    loss = CombinedLoss(losses, keys=keys)
    assert loss.target_keys == ("label", "sizes", "spacing", "index", "bounds", "image")
    assert (loss.optional_keys, loss.batch_keys) == ((), loss.target_keys)
    assert loss.host_keys == {"sizes", "index", "bounds"}
    del losses["exact"], keys["exact"]
    loss = CombinedLoss(losses, keys=keys)
    assert loss.optional_keys == ("index",) and loss.batch_keys == (*loss.target_keys, "index")


def test_a_key_that_one_loss_wants_on_the_device_goes_there():
    losses = {"size": size_loss(), "other": nn.MSELoss()}
    assert CombinedLoss(losses, keys={"other": {"label": "bounds"}}).host_keys == {"index"}


@pytest.mark.parametrize("spacing", [False, True])
def test_renamed_optional_and_named_entries_reach_the_loss(logits, target, spacing):
    keys = {"bounds": "sizes"} | ({"spacing_mm": "step"} if spacing else {})
    target |= {"index": torch.tensor([4, 7]), "spacing_mm": (9.0, 9.0), "step": (2.0, 3.0)}
    size = size_loss()
    value = CombinedLoss({"size": size}, keys={"size": keys})(logits, target)
    assert size.last.index.tolist() == [4, 7]
    given = {"bounds": target["sizes"]} | ({"spacing_mm": (2.0, 3.0)} if spacing else {})
    torch.testing.assert_close(value, size(logits, given))
    del target["index"]
    CombinedLoss({"size": size}, keys={"size": keys})(logits, target)
    assert size.last.index is None


def test_another_loss_gets_the_entries_that_are_named(logits):
    class Product(nn.Module):
        def forward(self, input, target):
            assert set(target) == {"one", "two"}
            return input.mean() * target["one"] * target["two"]

    target = {"a": torch.tensor(2.0), "b": torch.tensor(3.0), "c": torch.tensor(5.0)}
    loss = CombinedLoss({"product": Product()}, keys={"product": {"one": "a", "two": "c"}})
    torch.testing.assert_close(loss(logits, target), 10 * logits.mean())


@pytest.mark.parametrize("reads_meta", [False, True])
def test_only_losses_that_read_meta_data_get_them(logits, target, reads_meta):
    class Looks(Counted):
        def forward(self, input, target):
            assert type(input) is torch.Tensor
            assert type(target) is (MetaTensor if reads_meta else torch.Tensor)
            return input.mean() * target.mean()

    Looks.reads_meta = reads_meta
    loss = CombinedLoss({"one": Looks()})
    value = loss(MetaTensor(logits), {"label": MetaTensor(target["label"])})
    assert type(value) is torch.Tensor and type(loss.terms()["one"]) is torch.Tensor
    torch.testing.assert_close(value, logits.mean() * target["label"].mean())


@pytest.mark.parametrize("step", [1.0, 1.5])
def test_a_map_that_was_resampled_is_refused(logits, target, step):
    """It keeps the affine it was made with."""
    made = torch.eye(4).expand(2, 4, 4)
    now = made @ torch.diag(torch.tensor([-step, 1.0, 1.0, 1.0]))
    maps = MetaTensor(torch.rand(2, 2, 8, 8), affine=now, meta={"distance_map": {"affine": made, "scale_mm": 1.0}})
    loss = CombinedLoss({"first": Counted()}, keys={"first": {"label": "distance_map"}})
    target |= {"distance_map": maps, "boxes": maps}
    if step == 1:
        torch.testing.assert_close(loss(logits, target), logits.mean())
        return
    words = r"^distance_map: this distance map was resampled after it was made .* put SignedDistanceMapd after"
    with pytest.raises(ValueError, match=words):
        loss(logits, target)
    # A map that no loss takes is not looked at.
    assert torch.isfinite(CombinedLoss({"label": DiceLoss(softmax=True, to_onehot_y=True)})(logits, target))


# Refusals


def test_a_missing_target_is_named(logits, target):
    loss = CombinedLoss(parts(), keys={"dice": {"label": "segmentation"}})
    with pytest.raises(KeyError, match=r"no entry 'segmentation' for the loss 'dice', got \['boxes', 'label', "):
        loss(logits, target)


@pytest.mark.parametrize(
    ("losses", "options", "error", "words"),
    [
        ([DiceLoss()], {}, TypeError, "losses: expected a mapping from names to loss modules"),
        ({"dice": lambda x, y: x}, {}, TypeError, "losses: expected a mapping from names to loss modules"),
        ({}, {}, ValueError, "losses: expected at least one loss, got none"),
        ({"a": DiceLoss()}, {"keys": {"b": {}}}, ValueError, r"keys: \['b'\] name no loss; the losses are \['a'\]"),
        ({"a": DiceLoss()}, {"weights": {"b": 1.0}}, ValueError, r"weights: \['b'\] name no loss"),
        ({"a": DiceLoss()}, {"weights": {"a": float("nan")}}, ValueError, "weights: .* finite numbers, got nan"),
        (
            {"a": size_loss()},
            {"keys": {"a": {"bouns": "sizes"}}},
            ValueError,
            r"keys: \['bouns'\] name no entry that the loss 'a' reads; these are \['bounds', 'index', 'spacing_mm'\]",
        ),
    ],
)
def test_refuses_senseless_settings(losses, options, error, words):
    with pytest.raises(error, match=words):
        CombinedLoss(losses, **options)


def test_multipliers_belong_to_one_loss():
    lagrangian, barrier = Lagrangian(2, learning_rate=0.1), LogBarrierExtension()
    with pytest.raises(ValueError, match=r"'a' and 'b' share one Lagrangian, .* copy\.deepcopy"):
        CombinedLoss({"a": size_loss(lagrangian), "b": size_loss(lagrangian)})
    CombinedLoss({"a": size_loss(lagrangian), "b": size_loss(copy.deepcopy(lagrangian))})
    CombinedLoss({"a": size_loss(barrier), "b": size_loss(barrier)})  # one t for both


def test_the_key_alone_renames_the_main_entry():
    loss = CombinedLoss(
        {"weak": PartialCrossEntropyLoss(), "dice": nn.CrossEntropyLoss()}, keys={"weak": "points", "dice": "full"}
    )
    assert loss.batch_keys == ("points", "full")


def test_none_leaves_an_optional_entry_out():
    size = ConstraintLoss(soft_size, QuadraticPenalty(), softmax=True)
    assert CombinedLoss({"size": size}).batch_keys == ("bounds", "index")
    assert CombinedLoss({"size": size}, keys={"size": {"index": None}}).batch_keys == ("bounds",)
    with pytest.raises(ValueError, match="bounds"):
        CombinedLoss({"size": size}, keys={"size": {"bounds": None}})


def test_a_sum_of_sums_is_refused():
    with pytest.raises(TypeError, match="no sums themselves"):
        CombinedLoss({"inner": CombinedLoss({"ce": nn.CrossEntropyLoss()})})


def test_a_constraint_without_weight_moves_no_multiplier(logits, target):
    lagrangian = ReLULagrangian(learning_rate=0.1)
    size = ConstraintLoss(soft_size, lagrangian, softmax=True)
    loss = CombinedLoss({"size": size}, keys={"size": "sizes"}, weights={"size": 0.0})
    for weight, moved in ((0.0, False), (1.0, True)):
        loss.weights["size"] = weight
        loss(logits, target)
        lagrangian.step()
        assert bool((lagrangian.multipliers > 0).any()) == moved
