"""The ViT of MoCo v3: positions, sizes, initialisation, frozen patch projection, torchvision's forward pass."""

import math

import numpy as np
import pytest
import torch
import torchvision
from pool import build, close, small_args, views_of
from torch import nn

import mocov3_asym as M
from common.augment import rng

VIT = "--arch vit_tiny"


def vit(flags=""):
    torch.manual_seed(0)
    return M.build_vit(small_args(M, f"{VIT} {flags}"))


@pytest.mark.parametrize("grid, full, dim", [(4, 4, 16), (14, 14, 384), (3, 4, 16), (6, 14, 192)])
def test_positions(grid, full, dim):
    """Half the channels of a patch encode its row, half its column: sines, then cosines, of dim / 4 frequencies. In units
    of the full grid's patches: a smaller grid covers the same range, its patches' centres spread evenly."""
    found = M.sincos(grid, full, dim)
    assert found.shape == (1, 1 + grid**2, dim) and not found[0, 0].any()  # the class token has no place
    q = dim // 4
    for row in range(grid):
        for column in range(grid):
            expected = []
            for place in (row, column):
                at = (place + 0.5) * full / grid - 0.5
                angles = [at / 10000 ** (k / q) for k in range(q)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(found[0, 1 + row * grid + column].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("size", [16, 8, 12])
def test_it_is_torchvisions_vit_with_these_positions(size):
    """torchvision's own forward pass knows one size; it gets the positions as its parameter."""
    net, width = vit()
    nn.init.normal_(net.class_token)
    theirs = torchvision.models.VisionTransformer(size, 4, 12, 3, 192, 768)
    weights = {k: v for k, v in net.state_dict().items() if k != "encoder.pos_embedding"}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert set(missing) == {"encoder.pos_embedding", "heads.head.weight", "heads.head.bias"} and not unexpected
    theirs.heads = nn.Identity()
    theirs.encoder.pos_embedding.data = M.sincos(size // 4, 4, 192)
    x = torch.randn(3, 3, size, size, generator=rng(0))
    z = net(x)
    assert z.shape == (3, width) == (3, 192)
    close(z, theirs(x), 1e-4, 1e-5)
    close(net.eval()(x), z, 1e-3, 1e-4)  # torch's fused path


def test_positions_matter_and_are_not_learnt():
    net, _ = vit()
    x = torch.randn(2, 3, 16, 16, generator=rng(1))
    assert (net(x) - net(x.flip(3))).abs().max() > 1e-3
    assert "encoder.pos_embedding" in dict(net.named_buffers()) and "encoder.pos_embedding" in net.state_dict()
    assert not any("pos_embedding" in k for k, _ in net.named_parameters())


def test_initialisation():
    net, d = vit()
    block = net.encoder.layers.encoder_layer_3
    uniform = {block.self_attention.in_proj_weight: math.sqrt(6 / (2 * d)),  # three d x d matrices
               block.self_attention.out_proj.weight: math.sqrt(6 / (2 * d)),
               block.mlp[0].weight: math.sqrt(6 / (5 * d)), block.mlp[3].weight: math.sqrt(6 / (5 * d)),
               net.conv_proj.weight: math.sqrt(6 / (3 * 4 * 4 + d))}
    for p, bound in uniform.items():
        assert 0.98 * bound < p.abs().max() <= bound and p.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert all(not p.any() for k, p in net.named_parameters() if k.endswith("bias"))
    assert 0 < net.class_token.abs().max() < 1e-5 and net.encoder.ln.eps == block.ln_1.eps == 1e-6
    assert (net.encoder.ln.weight == 1).all()


def test_sizes_are_mocov3s():
    for arch, patch, d in (("vit_small", 16, 384), ("vit_base", 16, 768)):
        with torch.device("meta"):
            net = M.ViT(224, patch, *(M.VITS[arch][i] for i in (1, 3, 2)), 4 * d)
        assert M.VITS[arch] == (patch, 12, d, 12) and len(net.encoder.layers) == 12
        assert net.encoder.layers[0].self_attention.num_heads == 12 and net.encoder.layers[0].mlp[0].out_features == 4 * d


@pytest.mark.parametrize("flags, frozen", [("", True), ("--no-stop-grad-conv1", False)])
def test_the_patch_projection(flags, frozen):
    args = small_args(M, f"{VIT} {flags}")
    model = build(M, args)
    conv = model.source.backbone.conv_proj
    before = conv.weight.clone()
    optimizer = M.MoCoV3.optimizer(args, model)
    for number in range(2):
        src, tgt, generator = views_of(M, args, number)
        optimizer.zero_grad()
        model(src, tgt, 0.9, generator)[0].backward()
        optimizer.step()
    assert (conv.weight.grad is None) == frozen == torch.equal(conv.weight, before)
    learnt = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert (id(conv.weight) in learnt) != frozen
    assert all(p.grad is not None for p in model.source.parameters() if p.requires_grad)


def test_multicrop_gives_small_crops_their_places():
    args = small_args(M, f"{VIT} --multicrop-src --num-small 1 --mean-enc 2 --asym-bn")
    model = build(M, args)
    src, tgt, generator = views_of(M, args)
    assert src[1][0].shape[2:] == (8, 8)
    loss, _ = model(src, tgt, 0.9, generator)
    loss.backward()
    assert loss.isfinite()


def test_sizes_that_do_not_fit_the_patches_are_refused(capsys):
    for flags, said in (("--arch vit_tiny --img-size 30", "--img-size 30 is no multiple of the 4 px patches of vit_tiny; use 28 or 32"),
                        ("--arch vit_small --img-size 100 --recipe small", "use 96 or 112"),
                        ("--arch vit_tiny --multicrop-src --small-size 18", "--small-size 18"),
                        ("--no-stop-grad-conv1", "about ViTs, not --arch tiny"),
                        ("--arch vit_tiny --bn-groups 8 --asym-bn --bn-scope all", "drop --bn-scope"),
                        ("--arch vit_large", "vit_small")):
        with pytest.raises(SystemExit) as stopped:
            M.main(flags.split())
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and said in error and error.count("\n") == 1, error
