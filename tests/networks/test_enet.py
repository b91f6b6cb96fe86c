"""ENet: size, shapes, scripting, gradients, reach, learning, and the parts written anew for speed."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.networks import convert_to_torchscript
from torch import nn

from medconstraints.networks import ENet
from medconstraints.networks.enet import _Down, _extended, _PReLU, _Up

SMALL = (8, 8, 16)
SIZES = [(8, 8), (8, 31), (9, 15), (37, 24), (3, 5), (16, 16, 16), (8, 9, 17), (1, 13, 6)]


@pytest.fixture(autouse=True)
def _one_thread():
    """Layers this small lose more by the threads waiting for each other than they win, by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def bottleneck_parameters(dims, into, out, *, reduce=1, main=None):
    """Weights of one extension and the PReLU after the sum, counted from the paper's description."""
    width = out // 4
    main = 3**dims if main is None else main
    convolutions = into * width * reduce**dims + width * width * main + width * out
    norms, slopes = 2 * (width + width + out), width + width + out
    return convolutions + norms + slopes


def expected_parameters(dims, into, classes, fine, middle, coarse):
    initial = (fine - into) * into * 3**dims + 2 * fine + fine
    down = bottleneck_parameters(dims, fine, middle, reduce=2) + bottleneck_parameters(dims, middle, coarse, reduce=2)
    context = 6 * bottleneck_parameters(dims, coarse, coarse)
    context += 2 * bottleneck_parameters(dims, coarse, coarse, main=5 * dims)
    up = sum(bottleneck_parameters(dims, a, b) + a * b + 2 * b for a, b in ((coarse, middle), (middle, fine)))
    regular = 6 * bottleneck_parameters(dims, middle, middle) + bottleneck_parameters(dims, fine, fine)
    return initial + down + 2 * context + up + regular + fine * classes * 3**dims + classes


def test_parameter_count_is_the_published_one():
    # 0.37 million in the paper, which names neither the number of classes nor the biases it counts: 12 (CamVid) or 20
    # classes differ by 1200, biases by 2000, and the rounding hides 5000. 3 % is all of these together.
    for classes in (12, 20):
        assert parameters(ENet(2, 3, classes)) == pytest.approx(0.37e6, rel=0.03)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("into", "classes", "channels"), [(1, 3, (16, 64, 128)), (2, 4, (8, 12, 20))])
def test_parameter_count_is_that_of_the_table(dims, into, classes, channels):
    network = ENet(dims, into, classes, channels=channels)
    assert parameters(network) == expected_parameters(dims, into, classes, *channels)


def test_default_3d_weights_are_below_5_mb():
    state = ENet(3, 1, 3).state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) < 5e6


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_has_the_shape_of_the_input(size, train):
    network = ENet(len(size), 2, 3, channels=SMALL).train(train)
    out = network(torch.rand(1, 2, *size))
    assert out.shape == (1, 3, *size)
    assert out.isfinite().all()
    assert out.is_contiguous()


@pytest.mark.parametrize("size", [(13, 30), (11, 16, 21)], ids=str)
def test_odd_sizes_are_extended_by_their_border_and_cut(size):
    network, x = ENet(len(size), 1, 2, channels=SMALL).eval(), torch.rand(2, 1, *size)
    by_hand = x
    for axis, n in enumerate(size, start=2):
        for _ in range(-n % 8):
            by_hand = torch.cat([by_hand, by_hand.narrow(axis, by_hand.shape[axis] - 1, 1)], dim=axis)
    region = (slice(None), slice(None), *(slice(n) for n in size))
    assert torch.equal(network(x), network(by_hand)[region])


@pytest.mark.parametrize(("size", "expected"), [((8, 8), (8, 16)), ((16, 24), (16, 24)), ((1, 9, 17), (8, 16, 24))])
def test_extended_sizes(size, expected):
    assert _extended(torch.rand(1, 1, *size)).shape[2:] == expected


@pytest.mark.parametrize("size", [(24, 19), (9, 8, 17)], ids=str)
def test_scripted_equals_eager(tmp_path, size):
    network, x = ENet(len(size), 1, 3, channels=SMALL), torch.rand(2, 1, *size)
    with torch.no_grad():
        network(x)  # the running statistics are no longer those of the start
    file = tmp_path / "model.ts"
    scripted = convert_to_torchscript(network, filename_or_obj=str(file), verify=True, inputs=[x], device="cpu")
    for module in (scripted, torch.jit.load(str(file))):
        assert torch.equal(module(x), network(x))
        assert list(module.state_dict()) == list(network.state_dict())
    network.train(), scripted.train()
    for module in (network, scripted):
        torch.manual_seed(1)  # dropout
        network.zero_grad()
        module(x).square().mean().backward()  # the scripted module shares the parameters
        gradients = [p.grad.clone() for p in network.parameters()]
        if module is network:
            expected = gradients
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("size", [(32, 32), (16, 16, 16)], ids=str)
def test_gradients_reach_every_parameter(size):
    network = ENet(len(size), 1, 3, dropout=(0, 0))
    F.cross_entropy(network(torch.rand(2, 1, *size)), torch.randint(3, (2, *size))).backward()
    without = [n for n, p in network.named_parameters() if not (p.grad.isfinite().all() and p.grad.abs().sum() > 0)]
    assert not without


@pytest.mark.parametrize("axis", [0, 1])
def test_receptive_field(axis):
    """Stages 2 and 3 alone reach 2 * 8 * (1 + 2 + 2 + 4 + 1 + 8 + 2 + 16) = 576 pixels; undilated, they reach 160."""
    size = [16, 16]
    size[axis] = 800
    x = torch.rand(1, 1, *size, requires_grad=True)
    out = ENet(2, 1, 2).eval()(x).select(axis + 2, 0).sum()
    (gradient,) = torch.autograd.grad(out, x)
    reached = gradient[0, 0].abs().sum(1 - axis).nonzero().max()
    assert reached > 500


def test_main_convolutions_follow_the_paper():
    network = ENet(3, 1, 2, channels=SMALL)
    for stage in (network.stage2, network.stage3):
        mains = [block.extension.main for block in stage]
        assert [m.dilation[0] for m in mains if isinstance(m, nn.Conv3d)] == [1, 2, 4, 1, 8, 16]
        assert [isinstance(m, nn.Sequential) for m in mains] == [False, False, True, False] * 2
        assert [conv.kernel_size for conv in mains[2]] == [(5, 1, 1), (1, 5, 1), (1, 1, 5)]


def test_dropout_probabilities():
    network = ENet(2, 1, 2, channels=SMALL, dropout=(0.25, 0.5))
    found = {n.split(".")[0]: m.p for n, m in network.named_modules() if isinstance(m, nn.Dropout2d)}
    assert found == {"down1": 0.25, "stage1": 0.25} | dict.fromkeys(
        ("down2", "stage2", "stage3", "up4", "stage4", "up5", "stage5"), 0.5
    )


def test_state_dict_names_are_those_of_saved_weights():
    """A changed name makes every checkpoint unreadable."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    extension = [f"norm{i}.{n}" for i in (1, 2, 3) for n in norm] + ["act1.weight", "act2.weight"]
    extension += ["reduce.weight", "expand.weight"]
    blocks = {f"stage{s}.{i}": "main.weight" for s, n in ((1, 4), (2, 8), (3, 8), (4, 2), (5, 1)) for i in range(n)}
    blocks |= dict.fromkeys(("down1", "down2", "up4", "up5"), "main.weight")
    names = [f"initial.{n}" for n in ("conv.weight", "act.weight", *(f"norm.{n}" for n in norm))]
    names += ["head.weight", "head.bias"]
    for block in blocks:
        asymmetric = block in {f"stage{s}.{i}" for s, i in itertools.product((2, 3), (2, 6))}
        main = ["main.0.weight", "main.1.weight"] if asymmetric else ["main.weight"]
        names += [f"{block}.extension.{n}" for n in (*extension, *main)] + [f"{block}.act.weight"]
        if block.startswith("up"):
            names += [f"{block}.conv.weight", *(f"{block}.norm.{n}" for n in norm)]
    assert sorted(ENet(2, 1, 2, channels=SMALL).state_dict()) == sorted(names)


def test_learns_two_discs_of_different_intensity():
    """Background, a dark and a bright disc; the noise makes their intensities overlap."""
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    label = torch.zeros(4, 48, 48, dtype=torch.int64)
    for sample, (r1, c1, r2, c2) in enumerate([(14, 14, 32, 32), (32, 14, 14, 34), (14, 34, 34, 16), (32, 32, 13, 13)]):
        label[sample][(rows - r1) ** 2 + (columns - c1) ** 2 < 64] = 1
        label[sample][(rows - r2) ** 2 + (columns - c2) ** 2 < 64] = 2
    image = torch.tensor([0.0, 0.5, 1.0])[label] + 0.2 * torch.randn(label.shape)
    network = ENet(2, 1, 3)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(network(image[:, None]), label, weight=torch.tensor([0.2, 1.0, 1.0])).backward()
        optimizer.step()
    with torch.no_grad():
        predicted = network.eval()(image[:, None]).argmax(1)
    for c in (1, 2):
        dice = 2 * ((predicted == c) & (label == c)).sum() / ((predicted == c).sum() + (label == c).sum())
        assert dice > 0.7


@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 4), (2, 5, 4, 3), (2, 5, 4, 3, 2)], ids=str)
def test_prelu_is_that_of_torch(shape):
    ours, theirs, x = _PReLU(5).double(), nn.PReLU(5).double(), torch.randn(shape, dtype=torch.float64)
    slope = torch.tensor([-0.5, 0.0, 0.25, 1.0, 3.0], dtype=torch.float64)
    weights = torch.randn(shape, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        module.weight.data.copy_(slope)
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        found.append((out, *torch.autograd.grad((out * weights).sum(), (leaf, module.weight))))
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_prelu_second_derivatives():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    module = _PReLU(3).double()

    def call(x, weight):
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(call, (x, module.weight))
    assert torch.autograd.gradgradcheck(call, (x, module.weight))


@pytest.mark.parametrize("dims", [2, 3])
def test_unpool_is_that_of_torch(dims):
    x = torch.rand(2, 8, *(8, 6, 4)[:dims])
    coarse, positions = _Down(dims, 8, 16, 0.0).eval()(x)
    up = _Up(dims, 16, 8, 0.0, "transposed").eval()
    unpool = (F.max_unpool2d, F.max_unpool3d)[dims - 2]
    expected = up.act(unpool(up.norm(up.conv(coarse)), positions, 2) + up.extension(coarse))
    assert torch.allclose(up(coarse, positions), expected)


def test_down_keeps_the_maxima_in_the_first_channels():
    down, x = _Down(2, 4, 8, 0.0).eval(), torch.rand(1, 4, 6, 6)
    for p in down.extension.parameters():
        p.data.zero_()
    out, positions = down(x)
    assert torch.equal(out[:, :4], F.max_pool2d(x, 2))
    assert not out[:, 4:].any()
    assert torch.equal(x.flatten(2).gather(2, positions.flatten(2)).view(1, 4, 3, 3), F.max_pool2d(x, 2))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [(24, 21), (8, 12, 16)], ids=str)
def test_deterministic_algorithms_can_be_demanded(deterministic, size):
    network, x = ENet(len(size), 1, 2, channels=SMALL), torch.rand(2, 1, *size, requires_grad=True)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        out = copy.deepcopy(network)(x)
        runs.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_changes_nothing(memory_format):
    network, x = ENet(2, 2, 2).eval(), torch.rand(2, 2, 24, 24)
    expected = network(x)
    found = network.to(memory_format=memory_format)(x.to(memory_format=memory_format))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_meta_tensor_in_meta_tensor_out():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    out = ENet(2, 1, 2, channels=SMALL)(MetaTensor(torch.rand(1, 1, 11, 16), affine=affine))
    assert isinstance(out, MetaTensor)
    assert torch.equal(out.affine, affine.to(out.affine))


def test_half_precision_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        network, x = ENet(2, 1, 2, channels=SMALL), torch.rand(2, 1, 16, 16)
        out = network(x)
        with torch.no_grad():
            assert network(x).dtype == torch.bfloat16
    out.float().mean().backward()
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 1, 2), {}, "spatial_dims: expected 2 or 3, got 1"),
        ((2.0, 1, 2), {}, "spatial_dims: expected 2 or 3, got 2.0"),
        ((2, 0, 2), {}, "in_channels: expected an integer >= 1, got 0"),
        ((2, 1, 0), {}, "out_channels: expected an integer >= 1, got 0"),
        ((2, 1, True), {}, "out_channels: expected an integer >= 1, got True"),
        ((2, 1, 2), {"channels": 16}, "channels: expected three positive multiples of 4.*got 16"),
        ((2, 1, 2), {"channels": (16, 64)}, r"channels: expected three .*got \(16, 64\)"),
        ((2, 1, 2), {"channels": (16, 62, 128)}, "channels: expected three positive multiples of 4"),
        ((2, 1, 2), {"channels": (0, 64, 128)}, "channels: expected three positive multiples of 4"),
        ((2, 1, 2), {"channels": (16, 128, 64)}, "channels: expected them in ascending order"),
        ((2, 16, 2), {}, "channels: expected the first to be larger than in_channels = 16"),
        ((2, 1, 2), {"dropout": (0.1, 1.0)}, "dropout: expected two probabilities"),
        ((2, 1, 2), {"dropout": 0.1}, "dropout: expected two probabilities"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ENet(*arguments, **options)


@pytest.mark.parametrize(("dims", "shape"), [(2, (1, 16, 16)), (3, (1, 1, 16, 16))])
def test_wrong_number_of_axes(dims, shape):
    with pytest.raises(ValueError, match=rf"x: expected \(B, C, \*S\) with {dims} spatial axes, got shape"):
        ENet(dims, 1, 2, channels=SMALL)(torch.rand(shape))


@pytest.mark.parametrize("dims", [2, 3])
def test_interpolating_decoder_makes_no_checkerboard(dims):
    """An image without structure: neighbours differ by the parity of their place with transposed convolutions only."""

    def ripple(upsampling):
        network = ENet(dims, 1, 2, channels=(4, 8, 16), upsampling=upsampling).eval()
        with torch.no_grad():
            logits = network(torch.ones(1, 1, *(48,) * dims))[(..., *(slice(16, 32),) * dims)]
        return (logits[..., 2:] - 2 * logits[..., 1:-1] + logits[..., :-2]).abs().mean()

    assert ripple("transposed") > 20 * ripple("interpolated")


@pytest.mark.parametrize("dims", [2, 3])
def test_interpolating_network_can_be_scripted_and_trained(dims):
    network = ENet(dims, 1, 2, channels=(4, 8, 16), upsampling="interpolated")
    image = torch.randn(2, 1, *(19,) * dims)
    network(image).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.eval()
    torch.testing.assert_close(torch.jit.script(network)(image), network(image))


def test_unknown_upsampling_is_refused():
    with pytest.raises(ValueError, match=r'upsampling: expected "transposed" or "interpolated", got \'nearest\''):
        ENet(2, 1, 2, upsampling="nearest")
