"""The paper's tables as cells, each with the flags that make it here; and what a file of results holds."""

import json
import math
from dataclasses import dataclass

# A recipe: its flags, the epochs of one length of training, and the size of small crops. Micro keeps the ratio to large ones.
RECIPES = {"micro": ("--recipe demo --img-size 20", 7, "--small-size 10"), "demo": ("--recipe demo", 8, ""), "small": ("--recipe small", 200, ""),
           "gpu": ("--recipe small --arch tiny --batch-size 256 --warmup-epochs 0.5", 5, ""),
           "photos": ("--recipe demo --img-size 20", 4, "--small-size 10")}
# What a recipe changes of a script's own: with a slower target and rate MoCo v2's seeds differ less (results/micro.txt); gpu: results/gpu.txt;
# photos: results/photos.txt.
OWN = {("micro", "mocov2_asym"): "--ema 0.99 --lr 0.48", ("gpu", "mocov2_asym"): "--lr 0.06 --wd 1e-4",
       ("photos", "mocov2_asym"): "--ema 0.99 --lr 0.24"}


@dataclass(frozen=True)
class Cell:
    """A cell of one of the paper's tables: a script, the flags of a design, and what the paper has there, in %; nan: nothing."""

    row: str
    place: str
    paper: float
    flags: str = ""
    base: str = ""  # flags of the baseline that it is compared with
    base_paper: float = 65.8
    script: str = "mocov2_asym"
    v: tuple = ()  # the paper's variance (1e-4, Sec. 7) of what the source sees, and of the target; of designs that it measured

    @property
    def is_base(self):
        return self.flags == self.base

    @property
    def paper_delta(self):
        return round(self.paper - self.base_paper, 1)


V0 = 8.5  # the paper's baseline


def both(name, figures, v, src, tgt):
    """A case study of Sec. 4: a design of variance v on neither encoder, on the source, on the target, on both."""
    places = ("neither", "source", "target", "both")
    flags, variances = ("", src, tgt, f"{src} {tgt}"), ((V0, V0), (v, V0), (V0, v), (v, v))
    return [Cell(name, *cell, v=vs) for *cell, vs in zip(places, figures, flags, variances, strict=True)]


def mean_enc(n_src, n_tgt, paper):
    """n encodings averaged. The paper measured v for two, 4.2, about half; a third for three is our assumption."""
    flags = [f"--mean-enc-src {n_src}"] * (n_src > 1) + [f"--mean-enc {n_tgt}"] * (n_tgt > 1)
    v = {1: V0, 2: 4.2, 3: V0 / 3}
    return Cell("MeanEnc ↓", f"{n_src} source, {n_tgt} target", paper, " ".join(flags), v=(v[n_src], v[n_tgt]))


SEC4 = [
    *both("MultiCrop ↑", (65.8, 69.9, 57.1, 61.7), 38.0, "--multicrop-src", "--multicrop-tgt"),
    *both("ScaleMix ↑", (65.8, 67.3, 52.8, 64.8), 29.5, "--scalemix-src", "--scalemix-tgt"),
    *both("WeakerAug ↓", (65.8, 51.0, 67.2, 46.8), 6.9, "--aug-src weak", "--aug-tgt weak"),
    *both("StrongerAug ↑", (65.8, 66.7, 62.2, 66.2), 19.7, "--aug-src strong", "--aug-tgt strong"),
    Cell("Stronger & Weaker", "source ↑ target ↓", 67.2, "--aug-src strong --aug-tgt weak", v=(19.7, 6.9)),
    Cell("Stronger & Weaker", "source ↓ target ↑", 44.3, "--aug-src weak --aug-tgt strong", v=(6.9, 19.7)),
    *both("SyncBN ↓", (65.8, 64.7, 66.5, 66.0), 8.3, "--sync-bn-src", "--asym-bn"),
    mean_enc(1, 3, 67.9), mean_enc(2, 2, 67.1), mean_enc(3, 1, 59.9), mean_enc(1, 2, 67.5),
]
# Table 1, which encoder a design prefers: the cells with it on the source and on the target
SOURCE, TARGET = ("source", "3 source, 1 target"), ("target", "1 source, 3 target")


def framework(name, script, original, asym, scalemix, asym_bn, mean, flags=""):
    """A row of Tables 2 and 3: the symmetric original, the asymmetric version, and three designs with their differences from
    it. One BN group is these methods' default, and AsymBN needs several: it is compared with the same groups without it, of
    which the paper has no figure."""
    groups, symmetric = "--bn-groups 8", "--symmetrize"
    return [Cell(name, place, round(asym + delta, 1), f"{flags} {design}".strip(), f"{flags} {base}".strip(), asym, script)
            for place, design, base, delta in (("baseline", "", "", 0), ("ScaleMix", "--scalemix-src", "", scalemix),
                                               ("MeanEnc", "--mean-enc 2", "", mean), ("8 BN groups", groups, groups, math.nan),
                                               ("AsymBN", f"{groups} --asym-bn", groups, asym_bn),
                                               ("original", symmetric, symmetric, original - asym))]


# the paper trains the asymmetric versions, but Barlow Twins', twice as long as their originals
TABLE2 = [*framework("MoCo v3", "mocov3_asym", 69.9, 69.7, 1.0, 0.4, 0.9),
          *framework("SimCLR", "simclr_asym", 65.0, 65.0, 1.3, 0.8, 1.4),
          *framework("BYOL", "byol_asym", 69.5, 69.0, 1.4, 0.9, 0.7),
          *framework("SimSiam", "simsiam_asym", 67.8, 67.4, 1.3, 0.6, 0.6),
          *framework("Barlow Twins", "barlow_asym", 66.8, 66.4, 0.9, 0.2, 0.7)]
TABLE3 = framework("MoCo v3, ViT", "mocov3_asym", 69.1, 68.7, 0.4, 0.7, 0.7, "--arch vit_tiny")
COMPOSITIONS = [Cell("compositions", *cell) for cell in (
    ("none", 65.8, ""), ("+MultiCrop", 69.9, "--multicrop-src"), ("+AsymBN", 70.4, "--multicrop-src --asym-bn"),
    ("+MeanEnc", 71.3, "--multicrop-src --asym-bn --mean-enc 2"))]


def longer(times, epochs):
    """A column of Fig. 3, which prints no figures: the baseline and five asymmetric designs, some times as long."""
    length = f"--epochs {times * epochs}" if times > 1 else ""
    return [Cell(f"{times} x epochs", name, math.nan, f"{flags} {length}".strip(), length, math.nan) for name, flags in (
        ("baseline", ""), ("MultiCrop", "--multicrop-src"), ("ScaleMix", "--scalemix-src"), ("AsymAug", "--aug-tgt weak"),
        ("AsymBN", "--asym-bn"), ("MeanEnc", "--mean-enc 2"))]


def tables(recipe):
    epochs = RECIPES[recipe][1]
    return {"sec4": SEC4, "compositions": COMPOSITIONS, "2": TABLE2, "longer": longer(1, epochs) + longer(2, epochs) + longer(4, epochs),
            "3": TABLE3}


def key(cell, seed):
    """What tells one run of a file from another."""
    return cell.script, cell.flags, seed


def read(path):
    """key -> what is known of the run, of all runs in a file of results: what its lines say, the later ones added to the
    earlier. A line that was not written to its end says nothing, nor does one that is no run's."""
    runs = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
            runs.setdefault((found["script"], found["flags"], found["seed"]), {}).update(found)
        except (json.JSONDecodeError, TypeError, KeyError):
            continue
    return {k: r for k, r in runs.items() if math.isfinite(r.get("linear", math.nan))}
