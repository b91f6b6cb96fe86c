"""A weighted sum of losses, each with its own target."""

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceLoss
from torch import nn

from medconstraints.formulations import LogBarrierExtension
from medconstraints.losses import BoxPriorLoss, CombinedLoss


@pytest.fixture
def logits():
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target():
    label = torch.zeros(2, 1, 8, 8)
    label[:, :, 2:6, 3:7] = 1
    return {"boxes": torch.tensor([[[1, 2, 3, 6, 7]], [[1, 2, 3, 6, 7]]]), "label": label}


def parts():
    return {
        "boxes": BoxPriorLoss(LogBarrierExtension(), softmax=True),
        "dice": DiceLoss(softmax=True, to_onehot_y=True),
    }


def test_is_the_weighted_sum(logits, target):
    losses = parts()
    combined = CombinedLoss(losses, keys={"dice": "label"}, weights={"boxes": 0.3, "dice": 2.0})
    expected = 0.3 * losses["boxes"](logits, target["boxes"]) + 2.0 * losses["dice"](logits, target["label"])
    value = combined(logits, target)
    assert value.shape == ()
    torch.testing.assert_close(value, expected)


def test_gradient_is_the_weighted_sum(logits, target):
    losses, grads = parts(), []
    for function in (
        CombinedLoss(losses, keys={"dice": "label"}, weights={"dice": 0.5}),
        lambda x, y: losses["boxes"](x, y["boxes"]) + 0.5 * losses["dice"](x, y["label"]),
    ):
        own = logits.clone().requires_grad_()
        function(own, target).backward()
        grads.append(own.grad)
    torch.testing.assert_close(*grads)


def test_names_are_the_keys_and_one_is_the_weight_unless_given(logits, target):
    loss = CombinedLoss({"label": DiceLoss(softmax=True, to_onehot_y=True)})
    torch.testing.assert_close(loss(logits, target), DiceLoss(softmax=True, to_onehot_y=True)(logits, target["label"]))


def test_a_plain_tensor_goes_to_every_loss(logits, target):
    loss = CombinedLoss({"a": nn.CrossEntropyLoss(), "b": nn.CrossEntropyLoss()}, weights={"b": 2.0})
    label = target["label"][:, 0].long()
    torch.testing.assert_close(loss(logits, label), 3 * nn.CrossEntropyLoss()(logits, label))


def test_weights_are_read_at_every_pass(logits, target):
    loss = CombinedLoss(parts(), keys={"dice": "label"})
    first = loss(logits, target)
    loss.weights["boxes"] = 0.0
    terms = loss.terms()
    torch.testing.assert_close(loss(logits, target), first - terms["boxes"])


class Counted(nn.Module):
    """Mean of the input times a factor; counts its calls, and looks back at the last one."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, input, target):
        self.calls += 1
        return self.factor * input.mean()

    def terms(self):
        return {"calls": torch.tensor(float(self.calls))}


@pytest.mark.parametrize("skip", [False, True])
def test_losses_of_weight_0_may_be_left_out(logits, target, skip):
    parts = {"one": Counted(1.0), "two": Counted(10.0)}
    loss = CombinedLoss(parts, weights={"two": 0.0}, keys={"two": "label", "one": "label"}, skip_unweighted=skip)
    torch.testing.assert_close(loss(logits, target), logits.mean())
    assert [part.calls for part in parts.values()] == [1, 1 - skip]
    assert set(loss.terms()) == {"one", "one_calls"} | (set() if skip else {"two", "two_calls"})
    loss.weights["two"] = 0.5  # as a schedule does: from the next pass on
    torch.testing.assert_close(loss(logits, target), 6 * logits.mean())
    assert [part.calls for part in parts.values()] == [2, 2 - skip]
    assert set(loss.terms()) == {"one", "one_calls", "two", "two_calls"}
    loss.weights["two"] = -0.1  # only 0 is left out
    torch.testing.assert_close(loss(logits, target), 0 * logits.mean(), atol=1e-7, rtol=0)


def test_a_loss_that_is_left_out_needs_no_target(logits, target):
    loss = CombinedLoss(parts(), keys={"dice": "segmentation"}, weights={"dice": 0.0}, skip_unweighted=True)
    torch.testing.assert_close(loss(logits, target), parts()["boxes"](logits, target["boxes"]))
    loss.skip_unweighted = False
    with pytest.raises(KeyError, match="no entry 'segmentation' for the loss 'dice'"):
        loss(logits, target)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_with_all_weights_0_there_is_a_gradient_of_0(logits, target, skip, meta):
    loss = CombinedLoss(parts(), keys={"dice": "label"}, weights={"boxes": 0, "dice": 0}, skip_unweighted=skip)
    own = (MetaTensor(logits) if meta else logits.clone()).requires_grad_()
    value = loss(own, target)
    value.backward()
    assert type(value) is torch.Tensor
    assert (value.shape, value.item(), own.grad.abs().max().item()) == ((), 0, 0)
    assert (loss.terms() == {}) == skip


def test_terms(logits, target):
    loss = CombinedLoss(parts(), keys={"dice": "label"}, weights={"boxes": 0.5})
    value = loss(logits.requires_grad_(), target)
    terms = loss.terms()
    own = {"tightness", "size", "emptiness", "satisfied_tightness", "satisfied_size"}
    assert set(terms) == {"boxes", "dice"} | {f"boxes_{name}" for name in own}
    assert all(term.shape == () and not term.requires_grad for term in terms.values())
    torch.testing.assert_close(terms["boxes"] + terms["dice"], value.detach())
    unweighted = terms["boxes_tightness"] + terms["boxes_size"] + terms["boxes_emptiness"]
    torch.testing.assert_close(0.5 * unweighted, terms["boxes"])


def test_meta_tensors_give_a_plain_tensor(logits, target):
    loss = CombinedLoss(parts(), keys={"dice": "label"})
    value = loss(MetaTensor(logits), {name: MetaTensor(entry) for name, entry in target.items()})
    assert type(value) is torch.Tensor
    torch.testing.assert_close(value, loss(logits, target))


def test_state_of_the_parts_is_kept():
    loss = CombinedLoss(parts())
    assert list(loss.state_dict()) == ["losses.boxes.formulation.t"]
    loss.losses["boxes"].formulation.step()
    other = CombinedLoss(parts())
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.losses["boxes"].formulation.t, loss.losses["boxes"].formulation.t)


def test_a_missing_target_is_named(logits, target):
    loss = CombinedLoss(parts(), keys={"dice": "segmentation"})
    with pytest.raises(KeyError, match=r"no entry 'segmentation' for the loss 'dice', got \['boxes', 'label'\]; add"):
        loss(logits, target)


@pytest.mark.parametrize(
    ("losses", "options", "error", "words"),
    [
        ([DiceLoss()], {}, TypeError, "losses: expected a mapping from names to loss modules"),
        ({"dice": lambda x, y: x}, {}, TypeError, "losses: expected a mapping from names to loss modules"),
        ({}, {}, ValueError, "losses: expected at least one loss, got none"),
        (
            {"a": DiceLoss()},
            {"keys": {"b": "label"}},
            ValueError,
            r"keys: \['b'\] name no loss; the losses are \['a'\]",
        ),
        ({"a": DiceLoss()}, {"weights": {"b": 1.0}}, ValueError, r"weights: \['b'\] name no loss"),
        (
            {"a": DiceLoss()},
            {"weights": {"a": float("nan")}},
            ValueError,
            "weights: expected finite numbers, got nan for 'a'",
        ),
    ],
)
def test_refuses_senseless_settings(losses, options, error, words):
    with pytest.raises(error, match=words):
        CombinedLoss(losses, **options)


def test_a_loss_with_several_targets_gets_a_mapping(logits):
    """Parts of the target keep the names that the loss knows them by."""

    class Product(nn.Module):
        def forward(self, input, target):
            assert set(target) == {"one", "two"}
            return input.mean() * target["one"] * target["two"]

    target = {"a": torch.tensor(2.0), "b": torch.tensor(3.0), "c": torch.tensor(5.0)}
    loss = CombinedLoss({"product": Product()}, keys={"product": {"one": "a", "two": "c"}})
    torch.testing.assert_close(loss(logits, target), 10 * logits.mean())
    with pytest.raises(KeyError, match=r"no entry 'd' for the loss 'product'"):
        CombinedLoss({"product": Product()}, keys={"product": {"one": "a", "two": "d"}})(logits, target)


@pytest.mark.parametrize("keys", ["label", {"label": "label"}], ids=["alone", "as a part"])
@pytest.mark.parametrize("reads_meta", [None, False, True])
def test_only_losses_that_read_meta_data_get_them(logits, target, keys, reads_meta):
    class Looks(nn.Module):
        def forward(self, input, target):
            own = target["label"] if isinstance(target, dict) else target
            assert type(own) is (MetaTensor if reads_meta else torch.Tensor)
            return input.mean() * own.mean()

    if reads_meta is not None:
        Looks.reads_meta = reads_meta
    loss = CombinedLoss({"one": Looks()}, keys={"one": keys})
    value = loss(logits, target | {"label": MetaTensor(target["label"])})
    assert type(value) is torch.Tensor and type(loss.terms()["one"]) is torch.Tensor
    torch.testing.assert_close(value, logits.mean() * target["label"].mean())


@pytest.mark.parametrize("keys", ["distance_map", {"label": "label", "distance_map": "distance_map"}])
@pytest.mark.parametrize("step", [1.0, 1.5])
def test_a_map_that_was_resampled_is_refused(logits, target, keys, step):
    """Alone or as a part; it keeps the affine it was made with."""

    class First(nn.Module):
        def forward(self, input, target):
            return input.mean() * (target["distance_map"] if isinstance(target, dict) else target).mean()

    made = torch.eye(4).expand(2, 4, 4)
    now = made @ torch.diag(torch.tensor([-step, 1.0, 1.0, 1.0]))
    maps = MetaTensor(torch.rand(2, 2, 8, 8), affine=now, meta={"distance_map": {"affine": made, "scale_mm": 1.0}})
    loss = CombinedLoss({"first": First()}, keys={"first": keys})
    target = target | {"distance_map": maps, "boxes": maps}
    if step == 1:
        torch.testing.assert_close(loss(logits, target), logits.mean() * maps.as_tensor().mean())
        return
    words = r"^distance_map: this distance map was resampled after it was made .* put SignedDistanceMapd after"
    with pytest.raises(ValueError, match=words):
        loss(logits, target)
    other = CombinedLoss({"label": DiceLoss(softmax=True, to_onehot_y=True)})
    assert torch.isfinite(other(logits, target))  # a map that no loss takes is not looked at
