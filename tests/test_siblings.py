"""The six methods: losses, gradients, target, heads, recipes, switches. Against plain loops."""

import copy
import importlib
import math
from unittest.mock import Mock, patch

import pytest
import torch
from pool import SCRIPTS, SMALL, build, class_tree, close, small_args, small_images, views_of
from torch import nn
from torch.nn.functional import normalize
from torchvision.models.resnet import BasicBlock, Bottleneck

from common import data, resnet
from common.augment import rng
from common.lars import LARS

MODULES = {name: importlib.import_module(name) for name in SCRIPTS}
MOCOV2, MOCOV3, SIMCLR, BYOL, SIMSIAM, BARLOW = (
    MODULES[f"{name}_asym"] for name in "mocov2 mocov3 simclr byol simsiam barlow".split())
PREDICTOR, CLONE = {MOCOV3, BYOL, SIMSIAM}, {SIMCLR, SIMSIAM, BARLOW}
each = pytest.mark.parametrize("script", MODULES.values(), ids=MODULES)


def undrawn(script, args):
    """A model without weights, since torchvision draws millions of which tiny keeps few."""
    as_it_is = lambda x, **_: x
    with patch.multiple(nn.init, kaiming_uniform_=as_it_is, kaiming_normal_=as_it_is):
        return build(script, args)


def shaken(script, flags=""):
    """A model whose source and target have weights and statistics of their own."""
    args = small_args(script, flags)
    model = undrawn(script, args)
    for k, x in model.state_dict().items():
        noise = 2 * torch.rand(x.shape, generator=rng(1, k)) - 1
        if k.endswith("weight") and x.ndim > 1:
            x.copy_(noise * (3 / x[0].numel()) ** 0.5)
        elif x.ndim == 1 and x.is_floating_point():
            x.add_(0.2 * noise)
    return args, model


def loss_by_hand(script, args, model, u, v):
    """Of the encodings u (n, d) of the source and v (n, d) of the target, raw: a loop."""
    cross_entropy = lambda logits: (logits - logits[0]).exp().sum().log()
    terms, tau = [], getattr(args, "temperature", 1)
    if script is BARLOW:
        u, v = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in (u, v))
        for i in range(args.dim):
            for j in range(args.dim):
                c = (u[:, i] * v[:, j]).mean()
                terms.append((c - 1) ** 2 if i == j else args.lambd * c**2)
        return sum(terms)

    u = model.predictor(u) if script in PREDICTOR else u
    u, v = (x / x.norm(dim=1, keepdim=True) for x in (u, v))
    for i in range(len(u)):
        own, others = v[i] @ u[i], torch.arange(len(u)) != i
        logits = torch.cat([own[None], v[others] @ u[i]])
        if script is MOCOV2:
            terms.append(cross_entropy(torch.cat([own[None], model.queue @ u[i]]) / tau))
        elif script is MOCOV3:
            terms.append(2 * tau * cross_entropy(logits / tau))
        elif script is SIMCLR:
            if args.symmetrize or args.negatives == "all":
                logits = torch.cat([logits, u[others] @ u[i]])
            terms.append(cross_entropy(logits / tau))
        else:
            terms.append(((u[i] - v[i]) ** 2).sum() if script is BYOL else -own)
    return sum(terms) / len(u)


def encode_by_hand(net, bags):
    """A pass for each bag, all its views in one batch, and their mean. Statistics: the first's."""
    encodings = []
    for bag in bags:
        kept = {k: x.clone() for k, x in net.named_buffers()}
        z = net.projector(net.backbone(torch.cat(bag)))
        encodings.append(sum(z.chunk(len(bag))) / len(bag))
        for k, x in net.named_buffers() if len(encodings) > 1 else ():
            x.data.copy_(kept[k])
    return encodings


def step_by_hand(script, args, model, src, tgt):
    """Sec. 4.1: source's large crops and the mean of its small ones; of the target's, their mean.
    Sec. 6.2, the originals: SimCLR's views are one batch; Barlow's has one direction."""
    original = getattr(args, "symmetrize", False)
    if original and script is SIMCLR:
        u, v = encode_by_hand(model.source, [[torch.cat(src[0] + tgt[0])]])[0].chunk(2)
        return sum(loss_by_hand(script, args, model, *z) for z in ((u, v), (v, u))), u, v

    def one_way(src, tgt):
        z_src, z_tgt = encode_by_hand(model.source, src), encode_by_hand(model.target, tgt)
        z_tgt = [v if original and script is BARLOW else v.detach() for v in z_tgt]
        of_source = []
        for u in z_src:
            large, *small = [loss_by_hand(script, args, model, u, v) for v in z_tgt]
            of_source.append((large + sum(small) / len(small)) / 2 if small else large)
        large, *small = of_source
        return large + sum(small) / len(small) if small else large, z_src[0], z_tgt[0]

    loss, u, v = one_way(src, tgt)
    if original and script is not BARLOW:
        loss = (loss + one_way(tgt, src)[0]) * (0.5 if script is SIMSIAM else 1)
    return loss, u, v


CASES = ["", "--mean-enc 3 --mean-enc-src 2 --multicrop-src --multicrop-tgt", "--symmetrize"]
CASES = [(name, flags) for name in MODULES for flags in CASES]
CASES.remove(("mocov2_asym", "--symmetrize"))  # which never was
CASES += [("mocov2_asym", "--multicrop-src --temperature 0.05"), ("mocov2_asym", "--vanilla-head"),
          ("mocov3_asym", "--arch vit_tiny --multicrop-src"), ("mocov3_asym", "--temperature 0.3"),
          ("simclr_asym", "--negatives all --multicrop-src"), ("barlow_asym", "--lambd 1"),
          ("byol_asym", "--multicrop-tgt"), ("simsiam_asym", "--mean-enc-src 2")]


@pytest.mark.parametrize("name, flags", CASES)
def test_a_step_is_the_plain_loops(name, flags, double):
    """The loss, each gradient, the spread of the encodings, the target, the running statistics."""
    script = MODULES[name]
    args, model = shaken(script, f"--bn-groups 1 --num-small 2 {flags}")
    hand, m = copy.deepcopy(model), model.momentum(0.25)
    ema = 0 if script in CLONE else args.ema
    rise = 0 if script in CLONE or script is MOCOV2 else (1 - ema) * (1 - 0.5**0.5) / 2
    assert m == pytest.approx(ema + rise)  # from ema to 1 by a cosine, where it rises
    src, tgt, generator = views_of(script, args)
    loss, spreads = model(src, tgt, m, generator)
    loss.backward()

    if hand.target is not hand.source:
        for p, q in zip(hand.target.parameters(), hand.source.parameters(), strict=True):
            p.data = m * p + (1 - m) * q
    expected, u, v = step_by_hand(script, args, hand, src, tgt)
    expected.backward()

    close(loss, expected, 1e-9, 1e-12)
    for (k, p), q in zip(model.named_parameters(), hand.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), k
        if p.requires_grad:
            close(p.grad, q.grad, 1e-7, 1e-10)
    for side in ("source", "target"):
        theirs = getattr(hand, side).state_dict()
        for k, x in getattr(model, side).state_dict().items():
            close(x, theirs[k], 1e-9, 1e-12)
    for z, found in ((u, spreads["std_src"]), (v, spreads["std_tgt"])):
        close(found, normalize(z).std(0).mean() * z.shape[1] ** 0.5, 1e-9)
    if script is MOCOV2:  # one key of each image, after the loss: no image meets its own
        close(model.queue, torch.cat([normalize(v), hand.queue[16:]]), 1e-9, 1e-12)
        close(hand.queue.norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("size, batch", [(12, 4), (10, 4), (7, 5), (5, 5), (5, 8), (3, 10), (1, 4)])
def test_mocov2s_queue_is_first_in_first_out(size, batch):
    """And a seed has one of its own."""
    flags = f"--queue {size} --seed"
    model, other = (undrawn(MOCOV2, small_args(MOCOV2, f"{flags} {seed}")) for seed in (0, 1))
    expected = model.queue.tolist()  # oldest first
    assert expected != other.queue.tolist()
    for i in range(7):
        keys = torch.randn(batch, 16, generator=rng(i))
        model.enqueue(keys)
        expected = (expected + keys.tolist())[-size:]
        assert model.queue.roll(-model.queue_ptr.item(), 0).tolist() == expected


@each
def test_chance_is_the_loss_of_encodings_that_tell_nothing(script):
    """Equal ones where others are negatives, else independent ones, on average."""
    def loss(u, v):
        if script is BARLOW:
            return model.redundancy(u, v)
        if script in (BYOL, SIMSIAM):
            return model.distance(u, v)
        alike = u[:1].expand(16, -1)
        queue = [u[:1].expand_as(model.queue)] if script is MOCOV2 else []
        return model.info_nce(alike, alike, *queue)

    cases = {SIMCLR: ["", "--negatives all"], BARLOW: ["--bn-groups 1", "--bn-groups 4 --lambd 1"]}
    for case in cases.get(script, [""]):
        (_, model), losses = shaken(script, case), []
        for seed in range(300):
            u, v = (normalize(torch.randn(16, 16, generator=rng(seed, side))) for side in "uv")
            losses.append(loss(u, v).item() / 300)
        terms = {"": 1, "--multicrop-src": 2, "--multicrop-tgt": 1, "--symmetrize --bn-groups 1": 2}
        if script in (MOCOV2, BARLOW) or script is SIMCLR and not case:
            del terms["--symmetrize --bn-groups 1"]
        for flags, n in terms.items():
            args = small_args(script, f"{case} {flags}")
            assert undrawn(script, args).chance(args) == pytest.approx(n * sum(losses), rel=0.02, abs=0.02)


@each
def test_the_target_is_shuffled_where_groups_would_give_the_positive_away(script):
    for case in ["", "--symmetrize"] if script is SIMCLR else [""]:  # both views in one batch
        args, model = shaken(script, case)
        src, tgt, generator = views_of(script, args)
        before = generator.get_state()
        model(src, tgt, 0.9, generator)
        drawn = not torch.equal(before, generator.get_state())
        assert drawn == model.shuffle == (script in (MOCOV2, MOCOV3, SIMCLR))
    assert undrawn(script, small_args(script, "--bn-groups 1")).shuffle == (script is MOCOV2)


@pytest.mark.parametrize("flag, side, other", [("--asym-bn", "target", "source"),
                                               ("--sync-bn-src", "source", "target")])
@each
def test_asym_bn_synchronises_one_bn_of_one_encoder(script, flag, side, other):
    def groups(net):
        bns = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert all(type(m) is script.BatchNorm for m in bns)
        return {m.groups for m in bns}

    model = undrawn(script, small_args(script, f"--bn-groups 4 {flag}"))
    assert groups(getattr(model, side).projector) == {1}
    assert groups(getattr(model, side).backbone) == groups(getattr(model, other)) == {4}
    assert script not in PREDICTOR or groups(model.predictor) == {4}
    if script is BARLOW:  # the loss's BN is the projector's last
        assert model.standardize_src.groups == (1 if side == "source" else 4)
        assert model.standardize_tgt.groups == (1 if side == "target" else 4)
    model = undrawn(script, small_args(script, f"--bn-groups 4 {flag} --bn-scope all"))
    assert groups(getattr(model, side)) == {1} and groups(getattr(model, other)) == {4}


@each
def test_a_blocks_last_bn_starts_at_zero_and_the_target_as_a_copy(script):
    """Whatever the design. But MoCo v2's blocks are torchvision's."""
    model = build(script, small_args(script))
    other = build(script, small_args(script, "--asym-bn --sync-bn-src --bn-scope all"))
    nets = model.source, model.target, other.source
    for p, q, r in zip(*[net.parameters() for net in nets], strict=True):
        assert torch.equal(p, q) and p is not q and torch.equal(p, r)
    if script is MOCOV3:
        nets = *nets, resnet.build("resnet50", 32, script.BatchNorm, zero_init=True)[0]
    blocks = [m for net in nets for m in net.modules() if isinstance(m, BasicBlock | Bottleneck)]
    assert len(blocks) == 12 + 16 * (script is MOCOV3)
    for block in blocks:
        *others, last = [m for k, m in block.named_children() if k.startswith("bn")]
        assert last.weight.any() == (script is MOCOV2) and all(m.weight.all() for m in others)


# The tables of METHODS.md, written out.
HEADS = {  # in>out, b: with bias; B: BN, B-: without shift, B0: without scale and shift; R: ReLU
    "mocov2_asym": ["2048>2048b B R 2048>2048b R 2048>128b"],
    "mocov2_asym --vanilla-head": ["2048>2048b R 2048>128b"],
    "mocov3_asym": ["2048>4096 B R 4096>256 B0", "256>4096 B R 4096>256"],
    "mocov3_asym --arch vit_small": ["384>4096 B R 4096>4096 B R 4096>256 B0",
                                     "256>4096 B R 4096>256 B0"],
    "simclr_asym": ["2048>2048 B R 2048>128 B-"],
    "byol_asym": ["2048>4096b B R 4096>256", "256>4096b B R 4096>256"],
    "simsiam_asym": ["2048>2048 B R 2048>2048 B R 2048>2048 B0", "2048>512 B R 512>2048b"],
    "barlow_asym": ["2048>8192 B R 8192>8192 B R 8192>8192"]}
# Source's and target's blur, solarize and saturation; both sides' smallest crop, bicubic
MOCOS, BYOLS = [(0.5, 0, 0.4)] * 2, [(1.0, 0, 0.2), (0.1, 0.2, 0.2)]
ORIGINALS = {  # batch, learning rate reached, decay, warm-up, EMA, temperature; augmentation
    "mocov2_asym": (256, 0.03, 1e-4, 0, 0.999, 0.2, MOCOS, 0.2, False),
    "mocov3_asym": (4096, 9.6, 1e-6, 10, 0.99, 1.0, BYOLS, 0.2, False),
    "mocov3_asym --arch vit_base": (4096, 2.4e-3, 0.1, 40, 0.99, 0.2, BYOLS, 0.08, False),
    "mocov3_asym --arch vit_small": (4096, 2.4e-3, 0.1, 40, 0.99, 0.2, BYOLS, 0.08, False),
    "simclr_asym": (4096, 4.8, 1e-6, 10, None, 0.1, [(0.5, 0, 0.8)] * 2, 0.08, True),
    "byol_asym": (4096, 7.2, 1e-6, 10, 0.99, None, BYOLS, 0.08, True),
    "simsiam_asym": (512, 0.1, 1e-4, 0, None, None, MOCOS, 0.2, False),
    "barlow_asym": (2048, 1.6, 1e-6, 10, None, None, BYOLS, 0.08, True)}


def imagenet(which, more=""):
    name, _, flags = which.partition(" ")
    argv = f"--data none --recipe imagenet {flags} {more}".split()
    return MODULES[name], MODULES[name].parse_args(argv)


@pytest.mark.parametrize("which", HEADS)
def test_heads_of_the_imagenet_recipes(which):
    def word(m):
        if isinstance(m, nn.Linear):
            return f"{m.in_features}>{m.out_features}" + "b" * (m.bias is not None)
        if isinstance(m, nn.BatchNorm2d):
            return "B0" if not m.affine else "B" if m.bias.requires_grad else "B-"
        return {nn.ReLU: "R"}[type(m)]
    script, args = imagenet(which)
    with torch.device("meta"):
        heads = [script.projector(args, 384 if "vit" in which else 2048, script.BatchNorm)]
        if script in PREDICTOR:
            heads.append(script.predictor(args, script.BatchNorm))
    assert [" ".join(map(word, head)) for head in heads] == HEADS[which]


@pytest.mark.parametrize("which", ORIGINALS)
def test_the_imagenet_recipes_are_the_originals(which):
    (script, args), (*numbers, changes, scale, bicubic) = imagenet(which), ORIGINALS[which]
    names = "batch_size", "peak_lr", "wd", "warmup_epochs", "ema", "temperature"
    assert [getattr(args, k, None) for k in names] == pytest.approx(numbers)
    assert (args.img_size, args.epochs) == (224, 100)
    assert args.bn_groups == (8 if script is MOCOV2 else 1)
    assert getattr(args, "queue", 65536) == 65536 and getattr(args, "lambd", 0.0051) == 0.0051
    assert args.arch == (which.split()[-1] if "vit" in which else "resnet50")
    if script is BARLOW:  # of a gradient that was a 16th of the true one
        assert args.lr_bias * 2048 / 256 == pytest.approx(0.0384 / 16)

    both, small = script.augmentations(args), small_args(script, "--multicrop-src --multicrop-tgt")
    assert [(r.blur, r.solarize, r.strength[2]) for r in both] == changes
    assert all((r.scale, r.bicubic) == ((scale, 1), bicubic) for r in both)
    assert all((r.flip, r.jitter, r.grey) == (0.5, 0.8, 0.2) for r in both)
    assert all(r.normalize != (script is SIMCLR) and not r.randaugment for r in both)
    assert [bags[0][0].recipe.blur for bags in script.plan_views(args)] == [c[0] for c in changes]
    bags = script.plan_views(small)
    assert all(view.recipe.blur == 0 for [view, *_] in bags[0] + bags[1])
    if changes is BYOLS:
        assert script.augmentations(imagenet(which, "--swap-aug")[1]) == both[::-1]


def test_simclrs_images_stay_in_0_1_also_for_those_who_evaluate_a_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(SIMCLR, "train", lambda *job: seen.extend(job))
    SIMCLR.main(f"{SMALL} --data {class_tree(tmp_path / 'in')} --out {tmp_path / 'out'}".split())
    args, about, _, sets, _ = seen
    job = SIMCLR.plan_views(args), [(0, torch.arange(8))], 0, slice(None), 0, "cpu"
    ((((x,),), _), _), = data.stream(sets[0], *job)
    assert 0 <= x.min() < x.max() <= 1
    assert (about["mean"], about["std"]) == ([0, 0, 0], [1, 1, 1])
    assert {x.stats for x in sets} == {data.RAW}


@each
def test_optimisers_and_learning_rates_in_training(script, tmp_path, monkeypatch, capsys):
    """Linear scaling, warm-up, cosine. SimSiam's predictor: constant. Barlow's biases: another. A
    parameter that someone adds is trained; one in no group is refused."""
    args, model = shaken(script, "--lr 0.32 --wd 0.03 --epochs 2 --warmup-epochs .5 --knn-every 0")
    args.seed, stream = 3, Mock(wraps=script.data.stream)
    args.out, args.lr_bias, rates = tmp_path, 0.16, []
    optimizer = model.optimizer(args)
    optimizer.register_step_pre_hook(lambda o, *_: rates.append([g["lr"] for g in o.param_groups]))
    model.hack = nn.Parameter(torch.ones(2))
    groups = model.optimizer(args).param_groups
    assert any(p is model.hack for group in groups for p in group["params"])

    monkeypatch.setattr(script.Method, "optimizer", lambda *_: optimizer)
    monkeypatch.setattr(script, "SIGNALS", ())
    monkeypatch.setattr(script.data, "stream", stream)
    job = args, {"code": ""}, model, (small_images(48), None, None), torch.device("cpu")
    with pytest.raises(SystemExit):
        script.train(*job)
    assert "in no group of the optimizer: hack; see" in capsys.readouterr().err
    del model.hack
    script.train(*job)
    _, plan, _, seed, *_ = stream.call_args.args
    assert (plan, seed) == (script.plan_views(args), 3)
    sgd, settings = script in (MOCOV2, SIMSIAM), {"weight_decay": 0.03, "momentum": 0.9}
    settings |= {"nesterov": False, "dampening": 0} if sgd else {
        "trust": 0.001, "adapt_1d": False, "classic": script is SIMCLR}
    assert type(optimizer) is (torch.optim.SGD if sgd else LARS)
    assert all(group | settings == group for group in optimizer.param_groups)
    names = {id(p): k for k, p in model.named_parameters()}
    second = [(names[id(p)], p.ndim) for g in optimizer.param_groups[1:] for p in g["params"]]
    trained = [(k, p.ndim) for k, p in model.named_parameters() if p.requires_grad]
    assert second == {SIMSIAM: [(k, n) for k, n in trained if k.startswith("predictor.")],
                      BARLOW: [(k, n) for k, n in trained if n == 1]}.get(script, [])
    peak, warmup, total = 0.32 * 16 / 256, 1.5, 6  # steps
    assert len(rates) == total
    for step, found in enumerate(rates):
        cosine = (1 + math.cos((step - warmup) / (total - warmup) * math.pi)) / 2
        f = step / warmup if step < warmup else cosine
        more = {SIMSIAM: [peak], BARLOW: [f * peak / 2]}.get(script, [])
        assert found == pytest.approx([f * peak, *more])
