"""MoCo v3's ViT: positions, sizes, initialisation, frozen patches, torchvision's forward pass."""

import math

import pytest
import torch
import torchvision
from pool import build, close, small_args, views_of
from torch import nn

import mocov3_asym as M
from common.augment import rng


def vit():
    torch.manual_seed(0)
    return M.build_vit(small_args(M, "--arch vit_tiny"))


@pytest.mark.parametrize("grid, full, dim", [(4, 4, 16), (14, 14, 384), (3, 4, 16), (6, 14, 192)])
def test_positions(grid, full, dim):
    """Half the channels of a patch tell its row, half its column: sines, then cosines, of dim / 4
    frequencies, in units of the full grid's patches. A smaller grid, of a small crop, covers the
    same range, its patches' centres spread evenly. The class token has no place."""
    found, q = M.sincos(grid, full, dim), dim // 4
    assert found.shape == (1, 1 + grid**2, dim) and not found[0, 0].any()
    for number in range(grid**2):
        expected = []
        for place in divmod(number, grid):
            at = (place + 0.5) * full / grid - 0.5
            angles = [at / 10000 ** (k / q) for k in range(q)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        close(found[0, 1 + number], torch.tensor(expected), 0, 2e-5)


@pytest.mark.parametrize("size", [16, 8, 12])
def test_it_is_torchvisions_with_these_positions_at_each_size(size):
    """torchvision's own forward pass knows one size; it gets the positions as its parameter."""
    net, width = vit()
    nn.init.normal_(net.class_token)
    theirs = torchvision.models.VisionTransformer(size, 4, 4, 3, 96, 384)
    weights = {k: v for k, v in net.state_dict().items() if k != "encoder.pos_embedding"}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert len(missing) == 3 and not unexpected  # positions and the classifier's
    theirs.heads = nn.Identity()
    theirs.encoder.pos_embedding.data = M.sincos(size // 4, 4, 96)

    x = torch.randn(3, 3, size, size, generator=rng(0))
    z = net(x)
    assert width == 96
    close(z, theirs(x), 1e-4, 1e-5)
    close(net.eval()(x), z, 1e-3, 1e-4)  # torch's fused path


def test_initialisation():
    net, d = vit()
    block = net.encoder.layers.encoder_layer_3
    uniform = {block.self_attention.in_proj_weight: 2 * d,  # three d x d matrices
               block.self_attention.out_proj.weight: 2 * d,
               block.mlp[0].weight: 5 * d, block.mlp[3].weight: 5 * d,
               net.conv_proj.weight: 3 * 4 * 4 + d}
    for p, fans in uniform.items():
        bound = math.sqrt(6 / fans)
        assert 0.98 * bound < p.abs().max() <= bound
        assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert all(not p.any() for k, p in net.named_parameters() if k.endswith("bias"))
    assert 0 < net.class_token.abs().max() < 1e-5 and net.encoder.ln.eps == block.ln_1.eps == 1e-6
    assert "encoder.pos_embedding" in dict(net.named_buffers())  # not learnt


@pytest.mark.parametrize("arch, width", [("vit_small", 384), ("vit_base", 768)])
def test_sizes_are_mocov3s(arch, width):
    args = M.parse_args(f"--data none --recipe imagenet --arch {arch}".split())
    with torch.device("meta"):
        net, d = M.build_vit(args)
    assert d == width and net.encoder.pos_embedding.shape == (1, 1 + 14 * 14, d)
    assert net.conv_proj.weight.shape == (d, 3, 16, 16) and len(net.encoder.layers) == 12
    for block in net.encoder.layers:
        assert block.self_attention.num_heads == 12 and block.mlp[0].out_features == 4 * d


@pytest.mark.parametrize("flags, frozen", [("", True), ("--no-stop-grad-conv1", False)])
def test_the_patch_projection_is_frozen_unless_asked(flags, frozen):
    args = small_args(M, f"--arch vit_tiny --wd 0.03 {flags}")
    model = build(M, args)
    conv = model.source.backbone.conv_proj
    before, optimizer = conv.weight.clone(), model.optimizer(args)
    src, tgt, generator = views_of(M, args)
    model(src, tgt, 0.9, generator)[0].backward()
    optimizer.step()
    assert (conv.weight.grad is None) == frozen == torch.equal(conv.weight, before)
    [group] = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert (group["weight_decay"], group["betas"]) == (0.03, (0.9, 0.999))
